"""The paper's claims as experiments on a laptop: arms over seeds, paired, with intervals."""
