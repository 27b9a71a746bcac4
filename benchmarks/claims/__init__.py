"""The paper's claims as experiments for a laptop, over seeds and with confidence intervals."""
