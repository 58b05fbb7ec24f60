"""The file formats of flow and masks: one file each, behind `flow_data.flow_io` (flow) and `formats.masks` (masks).

To add a flow format, write a file with a `FlowFormat` and add that to `flow_data.flow_io.FORMATS`.
"""
