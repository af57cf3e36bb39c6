"""A language model as a judge: answers scored alone or in pairs, by any server that speaks chat completions.

Nothing here imports torch. ``ask`` sends questions and keeps the answers, ``scoring`` makes questions of answers and
scores of replies. The prompts are in ``prompts/``.
"""
