"""What the tasks' sources report, at other sizes and budgets: compare shapes, not digits."""

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
length exponential in its size, a model with a state of constant size cannot; Transformers copy strings
longer than those of training, state-space models do not. They use larger models: no figure is quoted.""",
    "scan": """\
Lake and Baroni 2018, arXiv 1711.00350: encoder and decoder networks, 100,000 presentations, commands right,
best of all their architectures: simple 99.8 %, length 20.8 %, addprim_jump 1.2 %.""",
}
"""By experiment; none where nobody has run the same."""
PUBLISHED["induction-fresh"] = PUBLISHED["induction"]
