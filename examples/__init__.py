"""The article's scenario made real: two adapters of one small language model, merged through the service.

All of it works on local files: importing the package keeps the Hugging Face libraries off the network, and keeps their
progress bars out of this one's.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
