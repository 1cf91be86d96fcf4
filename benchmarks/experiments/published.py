"""What the tasks' sources report, at other sizes and budgets: compare shapes, not digits."""

_INDUCTION = "Gu and Dao 2023, table 11"
FIGURES: dict[str, dict[str, dict[str, str]]] = {
    "induction": {
        f"{_INDUCTION}: attention, rotary": {
            "64": "100", "128": "100", "256": "100.0", "512": "83.6", "1,024": "31.3", "2,048": "18.4",
            "4,096": "8.6", "8,192": "9.0", "16,384": "5.5", "32,768": "out of memory",
        },
        f"{_INDUCTION}: attention, xPos": {
            "64": "100", "128": "100", "256": "100.0", "512": "99.6", "1,024": "67.6", "2,048": "25.4",
            "4,096": "7.0", "8,192": "9.0", "16,384": "7.8", "32,768": "out of memory",
        },
        f"{_INDUCTION}: H3": {
            "64": "100", "128": "100", "256": "100.0", "512": "80.9", "1,024": "39.5", "2,048": "23.8",
            "4,096": "14.8", "8,192": "8.2", "16,384": "5.9", "32,768": "6.6",
        },
        f"{_INDUCTION}: Mamba": dict.fromkeys(
            ("64", "128", "256", "512", "1,024", "2,048", "4,096", "8,192", "16,384", "32,768"), "100"
        ),
    },
    "scan": {
        "Lake and Baroni 2018, best of all architectures": {
            "simple": "99.8", "length": "20.8", "addprim_jump": "1.2",
        },
    },
}  # fmt: skip
"""Percentages by experiment, source and a test's label, where a test of theirs is like one of ours."""
FIGURES["induction-fresh"] = FIGURES["induction-long"] = FIGURES["induction"]

PUBLISHED: dict[str, str] = {
    "mqar": """\
Arora et al. 2023, "Zoology", arXiv 2312.04927: attention solves MQAR at every width tried; models with a
state of constant size need one that grows with the pairs. No figure is quoted: vocabularies, widths and
lengths differ.""",
    "induction": """\
Gu and Dao 2023, "Mamba", arXiv 2312.00752, section 4.1.2: two layers, vocabulary 16, trained at 256. Mamba
is right at all lengths up to 1,048,576; no other method (attention with absolute, rotary or xPos positions,
H3, Hyena) goes beyond twice the training length.""",
    "selective": """\
Gu and Dao 2023, "Mamba", arXiv 2312.00752, table 1: two layers, 16 data tokens in 4,096, tested at that
length: without gates S4 18.3 %, S6 97.0 %; in the Mamba block S4 56.4 %, Hyena 28.4 %, S6 (Mamba) 99.8 %.""",
    "copy": """\
Jelassi et al. 2024, "Repeat After Me", arXiv 2402.01032: a two-layer Transformer can copy strings of a
length exponential in its size, a model with a state of constant size cannot; trained on up to 50 letters,
Transformers with positions made for it (Hard-ALiBi) copy strings many times longer, with rotary ones hardly
any, and state-space models none. Models are of 160 M parameters: no figure is quoted.""",
    "scan": """\
Lake and Baroni 2018, arXiv 1711.00350: encoder and decoder networks, 100,000 presentations, commands right,
best of all their architectures: simple 99.8 %, length 20.8 %, addprim_jump 1.2 %.""",
}
"""In words, by experiment; none where nobody has run the same."""
PUBLISHED["induction-fresh"] = PUBLISHED["induction-long"] = PUBLISHED["induction"]
