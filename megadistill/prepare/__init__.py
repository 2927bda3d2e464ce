"""From published data sets to the files that runs read: sampled, cleaned, described."""
