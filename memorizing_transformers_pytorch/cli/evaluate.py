from memorizing_transformers_pytorch.cli_evaluate import *  # noqa
