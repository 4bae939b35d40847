"""Public drafters of families, by the `model_type` of their targets: one or two of each layout; none was loaded here.

Names are from model cards, engines' documents and issues, as in `docs/checkpoints.md`, which says what to know of them.
"""

KNOWN_DRAFTERS = {
    "apertus": ("thomaskiefer/EAGLE3-Apertus-8B-Instruct-2509",),
    "deepseek_v4": ("AQ-MedAI/DeepSeek-V4-Flash-0731-eagle3",),
    "gemma4": ("RedHatAI/gemma-4-31B-it-speculator.eagle3", "RedHatAI/gemma-4-26B-A4B-it-speculator.eagle3"),
    "glm4_moe": ("thoughtworks/GLM-4.7-FP8-Eagle3",),
    "glm4_moe_lite": ("thoughtworks/GLM-4.7-Flash-Eagle3",),
    "gpt_oss": (
        "Dogacel/specdrift-gpt-oss-120b-eagle3",
        "nvidia/gpt-oss-120b-Eagle3-v3",
        "RedHatAI/gpt-oss-20b-speculator.eagle3",
        "amazon/GPT-OSS-20B-P-EAGLE",
    ),
    "granitemoe": ("wantsleep/granite-3.1-1b-a400m-EAGLE3",),
    "kimi_k25": ("lightseekorg/kimi-k2.6-eagle3.1-mla", "nvidia/Kimi-K2.6-Eagle3"),
    "llama": (
        "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B",
        "yuhuili/EAGLE3-LLaMA3.3-Instruct-70B",
        "RedHatAI/Llama-3.1-8B-Instruct-speculator.eagle3",
    ),
    "llama4": (
        "nvidia/Llama-4-Maverick-17B-128E-Eagle3",
        "lmsys/SGLang-EAGLE3-Llama-4-Scout-17B-16E-Instruct-SpecForge",
    ),
    "minimax_m2": ("thoughtworks/MiniMax-M2.5-Eagle3",),
    "minimax_m3_vl": ("Inferact/MiniMax-M3-EAGLE3", "amd/MiniMax-M3-EAGLE3.1"),
    "olmoe": ("wantsleep/OLMoE_1B_7B_Eagle3",),
    "qwen2_5_vl": ("Rayzl/qwen2.5-vl-7b-eagle3-sgl",),
    "qwen3": (
        "AngelSlim/Qwen3-8B_eagle3",
        "RedHatAI/Qwen3-32B-speculator.eagle3",
        "RedHatAI/Qwen3-8B-speculator.peagle",
    ),
    "qwen3_5_moe": ("AQ-MedAI/Qwen3.5-397B-A17B-eagle3",),
    "qwen3_moe": ("lmsys/Qwen3-235B-A22B-EAGLE3", "amazon/Qwen3-Coder-30B-A3B-Instruct-P-EAGLE"),
    "qwen3_next": (
        "lmsys/SGLang-EAGLE3-Qwen3-Next-80B-A3B-Instruct-FP8-perfect-blend-regenerated",
        "thoughtworks/Qwen3-Coder-Next-Eagle3",
    ),
    "qwen3_vl": ("taobao-mnn/Qwen3-VL-8B-Instruct-Eagle3",),
    "qwen3_vl_moe": ("AngelSlim/Qwen3-VL-30B-A3B-Instruct_eagle3",),
}
