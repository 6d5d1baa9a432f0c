"""From a checkpoint to a bundle for the device. Needs torch: pip install 'fbclip[train]'."""

# %%
import sys

from rich.console import Console

from fbclip import Predictor, export

checkpoint = sys.argv[1] if len(sys.argv) > 1 else "nano"  # a checkpoint, or the folder of a run of `fbclip train`

# %% Each graph is run against the torch model; one that strays too far is an error, and nothing is written.
bundle = export(checkpoint, "part.fbclip", parity_images=["part.png"], console=Console())

# %% The device needs neither torch nor the checkpoint
with Predictor(bundle.path) as predict:
    print(predict)
    print(predict("part.png").verdict)
