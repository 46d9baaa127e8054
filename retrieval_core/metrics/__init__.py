"""Scores of generated images (§5.3 to §5.5): similarity, text following, diversity of answers.

Every score is in percent (100 times a cosine, as in Tables 3 and 4) and every mean comes as an
`Estimate` with its standard error. Images are [N, 3, H, W] in 0..1. Models enter through three
protocols, so that a VQA model or a known truth can answer: `Answerer`, `TextEmbedder`,
`ImageEmbedder`. transformers is imported only by what loads its models.
"""
