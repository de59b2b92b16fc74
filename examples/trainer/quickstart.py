"""A model trained from Python: `GMPOTrainer` in the place of a recipe.

python examples/trainer/quickstart.py smollm2-135m
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from gmpo import GMPOConfig, GMPOTrainer
from gmpo.policy.load import model_folder


def sums(a):
    """Rows of sums: a problem and its answer."""
    return [
        {"problem": f"What is {a} + {b}? Answer with just the number.", "answer": str(a + b)}
        for b in range(8)
    ]


train_dataset = sums(3)
eval_dataset = sums(5)


def train_gmpo_model(model_name):
    """Train a model by GMPO."""
    # 1. Model and tokenizer: any causal language model, in fp32 or bf16.
    model = AutoModelForCausalLM.from_pretrained(model_name)
    tokenizer = AutoTokenizer.from_pretrained(model_name)

    # 2. Settings
    gmpo_config = GMPOConfig(
        learning_rate=1e-5,
        batch_size=16,
        max_length=512,
        geometric_mean_epsilon=1e-8,
        importance_ratio_clip=2.0,
        gradient_clip_norm=1.0,
        entropy_coefficient=0.01,
    )

    # 3. Trainer
    trainer = GMPOTrainer(
        model=model,
        tokenizer=tokenizer,
        config=gmpo_config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
    )

    # 4. Training
    training_results = trainer.train(
        num_epochs=5,
        save_strategy="epoch",
        evaluation_strategy="steps",
        eval_steps=500,
        logging_steps=100,
    )

    return training_results


if __name__ == "__main__":
    results = train_gmpo_model(model_folder(sys.argv[1]))  # a hub name or folder stays itself
    print(f"훈련 완료: {results}")
