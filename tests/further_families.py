"""Backbones beside the usual ones: the rest of Hugging Face's sequence classifiers, and decoders without one.

A decoder without a classification class is a causal language model's trunk under a head of its own (`wrapped`), which
is how reward models are trained from it.
"""

from family_spec import D_MODEL, GQA, HEAD_DIM, MOE, N_HEADS, N_KV, WIDE, WINDOW, Family, alternating

# Multi-head latent attention: queries and keys in two parts, values of another width, all through low ranks.
_MLA = {"num_key_value_heads": N_HEADS, "q_lora_rank": 20, "kv_lora_rank": 14, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6, "v_head_dim": 10}  # fmt: skip
# Experts as DeepSeek writes them: one shared, four routed.
_ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
           "moe_intermediate_size": 24}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_GRANITE = {"residual_multiplier": 0.4, "embedding_multiplier": 3.0, "attention_multiplier": 0.2}
_NO_POSITIONS = {"max_position_embeddings": None}
_GPT_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
_GPT_NAMES = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}  # fmt: skip
_DELTA = {"linear_key_head_dim": 6, "linear_value_head_dim": 10, "linear_num_key_heads": 2,
          "linear_num_value_heads": 4}  # fmt: skip
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_expand": 2,
           "mamba_chunk_size": 16}  # fmt: skip


def mixed(n_layers: int, first: str = "linear_attention", second: str = "full_attention") -> dict[str, object]:
    """Another mixer on the even layers, full attention on the odd ones."""
    return {"layer_types": [(first, second)[i % 2] for i in range(n_layers)]}


def sparse(n_layers: int) -> dict[str, object]:
    """One dense MLP, then experts."""
    return {"mlp_layer_types": ["dense", *["sparse"] * (n_layers - 1)]}


FURTHER_SPECS: dict[str, Family] = {
    # --- the rest of GenericForSequenceClassification ---
    "arcee": Family("arcee", "Arcee", lambda n: WIDE),
    "axk1": Family("axk1", "AXK1", lambda n: {**_MLA, **_ROUTED, **sparse(n)}),
    "axk2": Family("axk2", "AXK2", lambda n: {**_MLA, **_ROUTED, **sparse(n), "index_topk": 256, "index_head_dim": 8,
                                              "index_n_heads": 2, "head_dim": 4, "gated_norm_rank": 4}),
    "cohere_compass_text": Family("cohere_compass", "CohereCompassText", lambda n: {
        **GQA, **alternating(n), "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10_000.0}
                                                     for kind in ("sliding_attention", "full_attention")}}),
    "deepseek_v2": Family(
        "deepseek_v2", "DeepseekV2",
        lambda n: {**_MLA, **_ROUTED, "first_k_dense_replace": 1, "topk_method": "group_limited_greedy"},
    ),
    "diffllama": Family("diffllama", "DiffLlama", lambda n: WIDE),
    "doge": Family("doge", "Doge", lambda n: GQA),
    "glm": Family("glm", "Glm", lambda n: WIDE),
    "hunyuan_v1_dense": Family("hunyuan_v1_dense", "HunYuanDenseV1", lambda n: WIDE),
    "hunyuan_v1_moe": Family("hunyuan_v1_moe", "HunYuanMoEV1", lambda n: {**WIDE, "num_experts": 4, "moe_topk": 2}),
    "jamba": Family(
        "jamba", "Jamba",
        lambda n: {**GQA, **_EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                   "expert_layer_offset": 0, "mamba_d_state": 6, "mamba_dt_rank": 5},
    ),
    "jetmoe": Family("jetmoe", "JetMoe", lambda n: {**GQA, **MOE, "kv_channels": HEAD_DIM},
                     {"num_attention_heads": None}),
    "minicpm3": Family("minicpm3", "MiniCPM3", lambda n: {**_MLA, "scale_depth": 1.1, "scale_emb": 1}),
    "minimax": Family("minimax", "MiniMax", lambda n: {**WIDE, **MOE, **mixed(n)}),
    "ministral": Family("ministral", "Ministral", lambda n: {**WIDE, **alternating(n)}),
    "ministral3": Family("ministral3", "Ministral3", lambda n: {**WIDE, "sliding_window": WINDOW}),
    "mistral4": Family("mistral4", "Mistral4", lambda n: {**_MLA, **_ROUTED, "first_k_dense_replace": 1}),
    "persimmon": Family("persimmon", "Persimmon"),
    "phimoe": Family("phimoe", "Phimoe",
                     lambda n: {**GQA, **MOE, "sliding_window": WINDOW, "router_jitter_noise": 0.4}),
    "qwen3_moe": Family(
        "qwen3_moe", "Qwen3Moe",
        lambda n: {**GQA, **_EXPERTS, "moe_intermediate_size": 24, "norm_topk_prob": True, "mlp_only_layers": [0]},
    ),
    "qwen3_next": Family(
        "qwen3_next", "Qwen3Next",
        lambda n: {**WIDE, **_EXPERTS, **_DELTA, **mixed(n), "moe_intermediate_size": 24,
                   "shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
    ),
    "seed_oss": Family("seed_oss", "SeedOss",
                       lambda n: {**WIDE, "attention_dropout": 0.0, "residual_dropout": 0.0}),
    # --- written by hand ---
    "biogpt": Family("biogpt", "BioGpt", lambda n: {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "ctrl": Family("ctrl", "CTRL", lambda n: _GPT_DROPOUT, {**_GPT_NAMES, "intermediate_size": "dff"}),
    "openai": Family("openai", "OpenAIGPT", lambda n: {**_GPT_DROPOUT, "attn_pdrop": 0.0},
                     {**_GPT_NAMES, "intermediate_size": None}),
    "zamba": Family(
        "zamba", "Zamba",
        lambda n: {"num_key_value_heads": N_HEADS, "mamba_d_state": 6, "mamba_dt_rank": 5,
                   "layers_block_type": ["linear_attention", "hybrid", "linear_attention"]},
    ),
    "zamba2": Family(
        "zamba2", "Zamba2",
        lambda n: {"mamba_d_state": 6, "n_mamba_heads": 4, "chunk_size": 16,
                   "layers_block_type": ["linear_attention", "hybrid", "linear_attention"]},
    ),
    "modernbert_decoder": Family("modernbert_decoder", "ModernBertDecoder", lambda n: {"local_attention": 2 * WINDOW}),
    # --- trunks under a head of their own ---
    "afmoe": Family("afmoe", "Afmoe", lambda n: {**WIDE, **_EXPERTS, **alternating(n), "num_dense_layers": 1,
                                                 "num_shared_experts": 1, "moe_intermediate_size": 24}, wrapped=True),
    "apertus": Family("apertus", "Apertus", lambda n: GQA, wrapped=True),
    "bamba": Family("bamba", "Bamba", lambda n: {**GQA, **_MAMBA2, "attn_layer_indices": [1]}, wrapped=True),
    "bitnet": Family("bitnet", "BitNet", lambda n: GQA, wrapped=True),
    "codegen": Family("codegen", "CodeGen", lambda n: {**_GPT_DROPOUT, "attn_pdrop": 0.0, "rotary_dim": 4},
                      {**_GPT_NAMES, "intermediate_size": "n_inner"}, wrapped=True),
    "cohere2": Family("cohere2", "Cohere2", lambda n: {**GQA, **alternating(n)}, wrapped=True),
    "cohere2_moe": Family("cohere2_moe", "Cohere2Moe", lambda n: {**WIDE, **_EXPERTS, **alternating(n), **sparse(n)},
                          wrapped=True),
    "cwm": Family("cwm", "Cwm", lambda n: {**WIDE, **alternating(n)}, wrapped=True),
    "dbrx": Family(
        "dbrx", "Dbrx",
        lambda n: {"attn_config": {"kv_n_heads": N_KV, "clip_qkv": 8.0, "rope_theta": 10_000.0},
                   "ffn_config": {"hidden_size": D_MODEL, "ffn_hidden_size": 56, "moe_num_experts": 4, "moe_top_k": 2}},
        {"hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
         "intermediate_size": None, "max_position_embeddings": "max_seq_len"}, wrapped=True,
    ),
    "dots1": Family("dots1", "Dots1", lambda n: {**GQA, **_ROUTED, **alternating(n), "first_k_dense_replace": 1},
                    wrapped=True),
    "ernie4_5": Family("ernie4_5", "Ernie4_5", lambda n: WIDE, wrapped=True),
    "ernie4_5_moe": Family(
        "ernie4_5_moe", "Ernie4_5_Moe",
        lambda n: {**GQA, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 1},
        wrapped=True,
    ),
    "exaone_moe": Family(
        "exaone_moe", "ExaoneMoe",
        lambda n: {**GQA, **_EXPERTS, **alternating(n), **sparse(n), "moe_intermediate_size": 24}, wrapped=True,
    ),
    "falcon_h1": Family("falcon_h1", "FalconH1", lambda n: {**GQA, **_MAMBA2, "mamba_d_ssm": 64}, wrapped=True),
    "flex_olmo": Family("flex_olmo", "FlexOlmo", lambda n: {**GQA, **_EXPERTS}, wrapped=True),
    "glm4_moe": Family("glm4_moe", "Glm4Moe", lambda n: {**GQA, **_ROUTED, "use_qk_norm": True}, wrapped=True),
    "glm4_moe_lite": Family("glm4_moe_lite", "Glm4MoeLite", lambda n: {**_MLA, **_ROUTED, **sparse(n)}, wrapped=True),
    "gpt_neox_japanese": Family(
        "gpt_neox_japanese", "GPTNeoXJapanese", lambda n: {"attention_dropout": 0.0, "intermediate_multiple_size": 2},
        {"intermediate_size": None}, wrapped=True,
    ),
    "granitemoe": Family("granitemoe", "GraniteMoe", lambda n: {**GQA, **MOE, **_GRANITE}, wrapped=True),
    "granitemoehybrid": Family(
        "granitemoehybrid", "GraniteMoeHybrid",
        lambda n: {**GQA, **_GRANITE, **_MAMBA2, **mixed(n), "num_local_experts": 0, "num_experts_per_tok": 0,
                   "shared_intermediate_size": 40}, wrapped=True,
    ),
    "granitemoeshared": Family(
        "granitemoeshared", "GraniteMoeShared", lambda n: {**GQA, **MOE, **_GRANITE, "shared_intermediate_size": 40},
        wrapped=True,
    ),
    "hyperclovax": Family("hyperclovax", "HyperCLOVAX", lambda n: {**WIDE, **_GRANITE, "use_post_norm": True},
                          wrapped=True),
    "jais2": Family("jais2", "Jais2", lambda n: WIDE, wrapped=True),
    "lfm2": Family("lfm2", "Lfm2", lambda n: {**GQA, **mixed(n, "conv"), "block_multiple_of": 8}, wrapped=True),
    "lfm2_moe": Family(
        "lfm2_moe", "Lfm2Moe",
        lambda n: {**GQA, **_EXPERTS, **mixed(n, "conv"), "moe_intermediate_size": 24, "num_dense_layers": 1},
        wrapped=True,
    ),
    "llama4_text": Family(
        "llama4", "Llama4Text",
        lambda n: {**WIDE, **MOE, "intermediate_size_mlp": 40, "num_experts_per_tok": 1, "moe_layers": [1, 2],
                   "attention_chunk_size": 64}, wrapped=True,
    ),
    "mellum": Family("mellum", "Mellum", lambda n: {**WIDE, **_EXPERTS, **alternating(n), **sparse(n),
                                                    "moe_intermediate_size": 24}, wrapped=True),
    "minimax_m2": Family("minimax_m2", "MiniMaxM2", lambda n: {**WIDE, **MOE}, wrapped=True),
    "nanochat": Family("nanochat", "NanoChat", lambda n: GQA, wrapped=True),
    "olmo_hybrid": Family("olmo_hybrid", "OlmoHybrid", lambda n: {**GQA, **_DELTA, **mixed(n)}, wrapped=True),
    "olmoe": Family("olmoe", "Olmoe", lambda n: {**GQA, **_EXPERTS}, wrapped=True),
    "qwen3_5_moe_text": Family(
        "qwen3_5_moe", "Qwen3_5MoeText",
        lambda n: {**WIDE, **_EXPERTS, **_DELTA, **mixed(n), "moe_intermediate_size": 24,
                   "shared_expert_intermediate_size": 40},
        {"intermediate_size": None}, wrapped=True,
    ),
    "solar_open": Family("solar_open", "SolarOpen", lambda n: {**WIDE, **_ROUTED}, {"intermediate_size": None},
                         wrapped=True),
    "vaultgemma": Family(
        "vaultgemma", "VaultGemma",
        lambda n: {**WIDE, **alternating(n), "query_pre_attn_scalar": HEAD_DIM, "attn_logit_softcapping": 3.0},
        wrapped=True,
    ),
    "youtu": Family("youtu", "Youtu", lambda n: _MLA, wrapped=True),
}  # fmt: skip

# Post-norm decoders: GPT-1's class does not run in 16 bits.
POST_NORM_DECODERS = ("openai",)

# What the search refuses, and why no `Structure` helps: the residual stream is not two writes a block.
REFUSED: dict[str, tuple[str, str]] = {
    "doge": ("does not add up", "the stream itself is multiplied by a learnt vector before each write"),
    "minimax": ("does not add up", "post-norm: the stream is replaced by its norm before each write"),
    "zamba": ("does not add up", "blocks of one write (Mamba); shared attention writes into the mixer's input alone"),
    "zamba2": ("does not add up", "as zamba"),
    "falcon_h1": ("does not add up", "three writes a block: attention and Mamba side by side, then the MLP"),
    "granitemoeshared": ("does not add up", "three writes a block: routed experts and a shared MLP side by side"),
    "gpt_neox_japanese": ("does not add up", "the last block adds a bias of attention outside of any module"),
    "modernbert_decoder": ("not understood", "a dense layer stands before the head: it needs a readout of its own"),
    "nanochat": ("own reward", "one norm is called twice, behind the embedding and before the head"),
}
