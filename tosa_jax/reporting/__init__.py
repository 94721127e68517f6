"""What people look at: figures, pictures of tokens, the closing report and its page.
Numbers are made in `train`, `models.cost` and `performance`.
"""
