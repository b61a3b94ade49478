"""What every command shares: arguments, its exit code, the terminal, texts and progress."""
