"""``python -m hvd_agn``: is all there that training needs, and what does it cost; and what starts ranks for both."""
