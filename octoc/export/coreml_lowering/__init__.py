"""How a Core ML package is made, step by step; `octoc.export.coreml` is the format.

`program` exports the graph for coremltools, `precision` chooses the arithmetic, `fingerprint` finds the weights in
what coremltools made of them, `encode` writes codes as operations, `storage` packs them, `package` is the folder, and
`read` takes codes out of a folder again.
"""
