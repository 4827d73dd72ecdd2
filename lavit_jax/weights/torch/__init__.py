"""PyTorch files <-> parameter trees and checkpoint folders.

The modules follow a conversion: find the files (`weight_files`, `files`), read them lazily
(`tensors`, `safetensors_files`, `pickle_files`, `digests`), recognize the format (`formats`,
`state_dict_names`), map the names (`name_rules`, `names_*`, `name_tables`, `mapping`, `matching`),
check the settings (`configs`), and write (`import_folder`, `export_folder`, `descriptions`).
`convert` is for the command line, `api` for scripts.
"""
