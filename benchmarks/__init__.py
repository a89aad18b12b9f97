"""Benchmarks: of the parts by pytest-benchmark (``test_parts``), of the whole beside other tools (``python -m benchmarks.compare``)."""
