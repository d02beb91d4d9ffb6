"""What others build on this code: six small diffs, and a third modality."""
