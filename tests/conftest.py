"""Settings for every test: no network, no progress bars, one thread (tiny models only lose by more)."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from transformers.utils import logging

torch.set_num_threads(1)
logging.disable_progress_bar()
