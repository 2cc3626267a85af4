"""What every room borrows: errors, files on disk, pictures and plots."""
