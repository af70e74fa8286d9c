"""Models judged: perplexity, tasks of lm_eval, and whether a difference is more than noise."""
