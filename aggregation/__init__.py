"""Adapters as values, and how to combine them. NumPy only; no framework, no network.

Where to look (each module's own text says more; ``docs/aggregation.md`` has the algebra):

==================== ===============================================================================
adapters as values   ``adapter`` ``spec`` ``module_spec`` ``spec_fields`` ``init`` ``low_rank``
                     ``guard``
PEFT's folders       ``peft_layout`` ``peft_config`` ``peft_types`` ``spec_from_peft``
                     ``named_from_peft`` ``tensor_file``
bytes for delivery   ``payload`` ``values`` ``sealed``
a recipe             ``recipe`` ``recipes`` ``piece`` ``pieces`` ``choices`` ``describing``
                     ``showing``
what goes together   ``soundness`` ``codec_soundness`` ``server_rules`` ``central_rules``
                     ``named_tensors``
train                ``train`` ``assignment`` ``rank_selection`` ``core_basis`` ``aligning``
codec                ``codec`` ``codecs`` ``block_codecs`` ``sparse_codecs`` ``index_coding``
                     ``error_feedback`` ``ring`` ``parcel`` ``parcel_keys``
weigh                ``weighing``
reduce               ``reducing`` ``summing`` ``running_sum`` ``padded_mean`` ``index_mean``
                     ``sent_mean`` ``sketching`` ``sketches``
reduce, with liars   ``robust`` ``robust_gram`` ``robust_rules`` ``coordinate_rules``
private              ``clipped_sum`` ``client_dp`` ``secure_pieces`` ``secret`` ``secret_ring``
                     ``secret_reduction`` ``shared_noise``
optimise             ``server_optimizer`` ``server_adaptive``
refactor             ``refactoring`` ``folding`` ``ridge`` ``thin_qr``
distribute           ``distributing`` ``sparse`` ``beside``
one aggregation      ``combining`` ``admission`` ``update`` ``state`` ``report``
by hand, off line    ``offline`` ``offline_clients`` ``offline_folders`` ``cli`` ``recipes_cli``
everywhere           ``durable`` ``errors`` ``output``
==================== ===============================================================================
"""
