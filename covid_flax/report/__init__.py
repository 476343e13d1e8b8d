"""The files that tell a person and a script how a run went."""
