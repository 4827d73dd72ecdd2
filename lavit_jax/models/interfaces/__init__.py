"""Visual interfaces: how LaVIT and other systems give an image to the language model.

    file                        interface                          who published it
    lavit.py                    LavitInterface                     LaVIT (continuous tokens)
    projections.py              LinearProjection, MlpProjection    LLaVA v1, v1.5
    resampler.py                ResamplerInterface                 Flamingo's, into the sequence
    flamingo.py                 FlamingoInterface                  Flamingo
    gated_cross_attention.py    the layers that Flamingo adds to the language model
    qformer.py                  QFormerInterface                   BLIP-2, InstructBLIP
    emu.py                      EmuInterface                       Emu
    emu_regression.py           how the language model predicts the vectors of Emu's interface

`build_interface` (variants.py) makes one by its name and sizes.

All follow one protocol (base.py): patch features and a `Context` in, `VisualTokens` out. A tower
(towers.py) makes the patch features from images.

    features = tower.features(tower_params, images)                          [B, N, D]
    tokens = interface.apply({'params': params}, features, Context(keep))    vectors [B, n, H]
    rows = pack_pairs(..., codes, tokens.lengths, ...)                       codes: i32[B, n]
    embedded = embed_sources(embedded, rows.source, tokens.vectors)

Flamingo's vectors do not stand in the sequence: layers between those of the language model read
them (`base.LayeredInterface`).

    images = gather_images(tokens.vectors, ...)                              vectors [R, M, n, W]
    llama.apply(..., extra=interface.extra_layers(params, images))
"""
