"""The paper's experiments on pictures from folders, each in the release's protocol."""
