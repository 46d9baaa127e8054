"""Scores of generated images (§5.3 to §5.5): similarity, text following, diversity of answers.

Every score is in percent (100 times a cosine, as in Tables 3 and 4) and every mean comes as an
`Estimate` with its standard error. Images are [N, 3, H, W] in 0..1. Models enter through three
protocols, so that a VQA model or a known truth can answer: `Answerer`, `TextEmbedder`,
`ImageEmbedder`. transformers is imported only by what loads its models.

    clip_t = text_similarity(images, prompts, clip)          # ImageScore: values [N], estimate
    clip_i = image_similarity(images, references, clip)      # the same with DINO is DINO-I
    answers = ask(images, DEFAULT_QUESTIONS, vqa)            # question -> one answer per image
    result = score_answers(answers, clip, similarity=clip_i.values)
    result.score, result.weighted                            # Estimates

`vqa_models.load_vqa`, `encoders.load_clip` and `encoders.load_dino` load models in the format of
transformers, and `model_folder.find_model` finds or fetches one by name.
"""
