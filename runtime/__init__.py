"""From a bundle to results. Needs neither torch nor open_clip."""
