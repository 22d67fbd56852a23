"""`memorizing-transformers export RUN FOLDER`: a run as a model of transformers."""

from __future__ import annotations

from memorizing_transformers_pytorch.cli.options.export import Export


def main(options: Export) -> None:
    """Run `export`. Raises ValueError for bad input."""
    try:
        from memorizing_transformers_pytorch.huggingface.export import export_run
    except ImportError as error:
        raise ValueError(f"expected the extra 'huggingface' to be installed, got {error}") from error
    export_run(options.run, options.folder, options.checkpoint)
    print(f"wrote {options.folder}")
