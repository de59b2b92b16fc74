"""Data, a reward function and a callback written for TRL, through its trainer and gmpo's.

python examples/trainer/from_trl.py smollm2-135m --trainer trl
python examples/trainer/from_trl.py smollm2-135m --trainer gmpo
"""

import argparse

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from gmpo.policy.load import model_folder

# As a TRL user has them: chats and another column, and a function of both.
dataset = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": f"What is {a} + {b}? Just the number."}],
            "total": a + b,
        }
        for a in (1, 2)
        for b in (1, 2, 3, 4)
    ]
)


def reward_total(prompts, completions, total, **kwargs):
    """1 for the right number and nothing else, 0.5 if it is somewhere in the text."""
    texts = [completion[0]["content"] for completion in completions]
    return [
        1.0 if text.strip() == str(right) else 0.5 * (str(right) in text)
        for text, right in zip(texts, total, strict=True)
    ]


class PrintReward(TrainerCallback):
    """Prints what was earned since the last log."""

    def on_log(self, args, state, control, logs, **kwargs):
        """Called with what is logged."""
        if "reward" in logs:
            print(f"step {state.global_step} of {state.max_steps}: reward {logs['reward']:.3f}")


def train_with_trl(model, tokenizer):
    """Two rounds of four optimizer steps by TRL."""
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

    trainer = GMPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward_total,
        train_dataset=dataset,
        callbacks=[PrintReward()],
        args=GMPOConfig(
            output_dir="runs/from_trl-trl",
            learning_rate=1e-5,
            num_generations=8,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            steps_per_generation=4,
            max_completion_length=16,
            lr_scheduler_type="constant",
            num_train_epochs=1,
            logging_steps=4,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
    )
    result = trainer.train()
    print(f"trained by TRL: loss {result.training_loss:.4f}, {result.global_step} steps")


def train_with_gmpo(model, tokenizer):
    """The same by gmpo: only the constructor and the settings have other names."""
    from gmpo import GMPOConfig, GMPOTrainer

    trainer = GMPOTrainer(
        model=model,
        tokenizer=tokenizer,
        reward=reward_total,
        train_dataset=dataset,
        callbacks=[PrintReward()],
        config=GMPOConfig(
            learning_rate=1e-5,
            group_size=8,
            batch_size=8,
            steps_per_round=4,
            max_new_tokens=16,
            max_length=128,
        ),
    )
    outcome = trainer.train(num_epochs=1, save_strategy="no", logging_steps=4)
    print(f"trained by gmpo: {outcome}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="smollm2-135m, a hub name or a folder")
    parser.add_argument("--trainer", choices=["trl", "gmpo"], required=True)
    arguments = parser.parse_args()
    folder = model_folder(arguments.model)  # a hub name or folder stays itself
    train = {"trl": train_with_trl, "gmpo": train_with_gmpo}[arguments.trainer]
    train(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
