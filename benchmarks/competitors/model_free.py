"""What a user of llm-compressor runs to quantize without calibration: `model_free_ptq` on the processor."""

from __future__ import annotations

import argparse

from llmcompressor import model_free_ptq


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--scheme", required=True)
    options = parser.parse_args()
    model_free_ptq(
        model_stub=options.source,
        save_directory=options.target,
        scheme=options.scheme,
        ignore=["lm_head", "model.embed_tokens"],
        device="cpu",
    )


if __name__ == "__main__":
    main()
