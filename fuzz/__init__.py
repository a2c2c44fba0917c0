"""Properties that no input may break, and the fuzzing that tries to. See README.md."""
