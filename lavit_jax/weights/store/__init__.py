"""Our own checkpoints: a folder with a config and one Orbax array tree a part."""
