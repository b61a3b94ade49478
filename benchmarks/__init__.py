"""Programs that measure and print. None runs in the tests."""
