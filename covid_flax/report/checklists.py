"""The items of two reporting guidelines, named in our own words, and which statement answers each.

CLAIM: Checklist for Artificial Intelligence in Medical Imaging, 2024 update (Tejani et al.,
Radiology: Artificial Intelligence 2024, doi:10.1148/ryai.240300), 44 items. TRIPOD+AI: Collins et
al., BMJ 2024;385:e078378, 27 items in 52 parts.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Item:
    """One item.

    Attributes:
      number: in its guideline.
      name: what it asks for, in a few words of ours.
      statement: key of what a run's artefacts say of it, see `covid_flax.report.statements`; ""
        where no artefact can.
      whole: whether that statement can be all that the item asks for, or a part at most.
    """

    number: str
    name: str
    statement: str = ""
    whole: bool = True


CLAIM = (
    Item("1", "Named as a study of AI, and the kind of technique", "technique"),
    Item("2", "Summary of design, methods and results"),
    Item("3", "Background, intended use and role"),
    Item("4", "Aims and hypotheses"),
    Item("5", "Prospective or retrospective"),
    Item("6", "Goal of the study"),
    Item("7", "Where the data come from", "data", whole=False),
    Item("8", "Which patients or images were let in and kept out"),
    Item("9", "Preprocessing", "preprocessing"),
    Item("10", "Choice of a part of the data"),
    Item("11", "De-identification"),
    Item("12", "Missing data"),
    Item("13", "How the images were acquired"),
    Item("14", "What the reference standard is"),
    Item("15", "Why that reference standard"),
    Item("16", "Who annotated"),
    Item("17", "Annotation of the test images"),
    Item("18", "Agreement within and between annotators"),
    Item("19", "How images were assigned to splits", "partition"),
    Item("20", "Level at which splits are disjoint", "disjoint"),
    Item("21", "Intended sample size"),
    Item("22", "Description of the model", "model"),
    Item("23", "Software and versions", "software"),
    Item("24", "First values of the parameters", "initialization"),
    Item("25", "Training", "training"),
    Item("26", "How the final model was chosen", "selection"),
    Item("27", "Ensembles", "ensemble"),
    Item("28", "Measures of performance", "measures"),
    Item("29", "Measures of significance and uncertainty", "uncertainty"),
    Item("30", "Robustness", "robustness", whole=False),
    Item("31", "Methods of explanation"),
    Item("32", "Evaluation on internal data", "internal"),
    Item("33", "Testing on external data", "external"),
    Item("34", "Registration of a clinical trial"),
    Item("35", "Numbers let in and kept out", "counts", whole=False),
    Item("36", "Patients' characteristics in each split"),
    Item("37", "Performance with its uncertainty", "performance"),
    Item("38", "Diagnostic performance and its precision", "diagnostic"),
    Item("39", "Analysis of wrong answers", "failures", whole=False),
    Item("40", "Limitations", "limits", whole=False),
    Item("41", "What it means for practice"),
    Item("42", "Full protocol or further technical detail"),
    Item("43", "Availability of software, model and data", "availability", whole=False),
    Item("44", "Funding, and the funders' role"),
)
"""Of CLAIM, in its order."""

TRIPOD_AI = (
    Item("1", "Title: kind of model, population, outcome", "technique", whole=False),
    Item("2", "Abstract"),
    Item("3a", "Medical context, and existing models"),
    Item("3b", "Target population, place in care, users"),
    Item("3c", "Known inequalities of health"),
    Item("4", "Objectives"),
    Item("5a", "Sources of the data, and how representative", "data", whole=False),
    Item("5b", "Dates of the data"),
    Item("6a", "Setting and centres"),
    Item("6b", "Eligibility of patients"),
    Item("6c", "Treatments"),
    Item("7", "Preparation of the data", "preprocessing"),
    Item("8a", "Outcome and how it was assessed", "outcome", whole=False),
    Item("8b", "Who assessed the outcome"),
    Item("8c", "Blinding of that assessment"),
    Item("9a", "Choice of predictors"),
    Item("9b", "Predictors and how they were measured", "predictors", whole=False),
    Item("9c", "Who assessed the predictors"),
    Item("10", "Sample size and its reason"),
    Item("11", "Missing data"),
    Item("12a", "Use of the data, and its parts", "partition"),
    Item("12b", "Handling of predictors", "preprocessing"),
    Item("12c", "Kind of model, building, tuning, internal validation", "training", whole=False),
    Item("12d", "Differences between clusters in the analysis"),
    Item("12e", "Measures of performance", "measures"),
    Item("12f", "Updating of the model", "recalibration", whole=False),
    Item("12g", "How predictions were computed", "prediction"),
    Item("13", "Class imbalance", "imbalance"),
    Item("14", "Fairness"),
    Item("15", "Output of the model and its thresholds", "output"),
    Item("16", "Training data against evaluation data", "same_data", whole=False),
    Item("17", "Ethical approval and consent"),
    Item("18a", "Funding"),
    Item("18b", "Conflicts of interest"),
    Item("18c", "Protocol"),
    Item("18d", "Registration"),
    Item("18e", "Sharing of the data"),
    Item("18f", "Sharing of the code", "availability", whole=False),
    Item("19", "Involvement of patients and the public"),
    Item("20a", "Flow of participants", "counts", whole=False),
    Item("20b", "Characteristics of participants"),
    Item("20c", "Evaluation data against development data"),
    Item("21", "Participants and outcomes in each analysis", "counts", whole=False),
    Item("22", "The full model", "specification", whole=False),
    Item("23a", "Performance with intervals, also of subgroups", "performance", whole=False),
    Item("23b", "Differences between clusters in performance"),
    Item("24", "Result of updating", "recalibration", whole=False),
    Item("25", "Interpretation"),
    Item("26", "Limitations", "limits", whole=False),
    Item("27a", "Poor or missing input in use"),
    Item("27b", "Users' part and expertise"),
    Item("27c", "Next steps of research"),
)
"""Of TRIPOD+AI, in its order."""
