"""From seeds to images: settings, batches, jobs and processes."""
