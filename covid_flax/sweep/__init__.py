"""Many settings of one configuration, trained, judged and ranked: what scripts/sweep.py runs."""
