"""The evaluation protocol of §5.3, for the core and for any ComfyUI workflow.

`python -m retrieval_core.evaluate` runs it: characters x prompts x seeds, several samples each,
in-domain and held-out characters apart; every method over its weight; similarity against text
following, and diversity. A folder of results accepts more methods; an interrupted run resumes.
"""
