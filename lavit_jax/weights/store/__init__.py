"""Our checkpoint folders: a config, and one Orbax array tree for each module."""
