"""What PEFT trains beside a model, merged into it: one module for each kind of adapter, and what they share.

Facts: peft 0.21.2, whose `merge_and_unload` gives the numbers.
"""
