"""What a public data set needs beyond the general readers."""
