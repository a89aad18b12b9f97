"""What a user would run instead, each a small script: ``python FILE.py SRC DST [options]``. None of them imports streamconv."""
