"""Other libraries, the real ones, take these models as they take timm's."""
import os
import subprocess
import sys

import pytest
import timm
import torch
from conftest import tool_environment
from torch.nn import functional as F

import vim2  # noqa: F401
from vim2._script import run_script


def package(name, extra='dev'):
    return pytest.importorskip(name, reason=f"{name} is not installed: pip install 'vim2[{extra}]'")


def batch(n=2, size=64):
    torch.manual_seed(0)
    return torch.randn(n, 3, size, size)


def test_transformers(tmp_path):
    """TimmWrapper: saved and loaded by transformers, with the logits of timm's model."""
    transformers = package('transformers')
    config = transformers.TimmWrapperConfig(architecture='test_vim2', num_labels=7, do_pooling=True)
    model = transformers.AutoModelForImageClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    x = batch()
    with torch.no_grad():
        logits = loaded(x, labels=torch.tensor([1, 2])).logits
        assert logits.shape == (2, 7) and torch.equal(logits, model.timm_model(x))
        timm_features = model.timm_model.forward_features(x)
    features = transformers.AutoModel.from_pretrained(tmp_path).eval()(x).last_hidden_state
    assert torch.equal(features, timm_features)


def test_peft(tmp_path):
    """LoRA on the mixers' projections: it alone is trained, it is saved by itself, and it changes the result."""
    peft = package('peft')
    torch.manual_seed(0)
    base = timm.create_model('test_vim2', num_classes=3)
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    config = peft.LoraConfig(r=2, target_modules=['in_proj', 'gate_proj', 'out_proj'], modules_to_save=['head.fc'])
    model = peft.get_peft_model(base, config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    x, y = batch(), torch.tensor([0, 2])
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(model(x), y)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    plain = {n.replace('base_model.model.', '').replace('.base_layer', ''): p for n, p in model.named_parameters()}
    frozen = [n for n in before if n in plain and not n.startswith('head.fc')]
    assert len(frozen) > 30 and all(torch.equal(before[n], plain[n]) for n in frozen)
    adapted = [n for n, p in model.named_parameters() if 'lora_B' in n]
    assert adapted and all(p.abs().max() > 0 for n, p in model.named_parameters() if 'lora_B' in n), 'not reached'
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(timm.create_model('test_vim2', num_classes=3), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x), model.eval()(x))
        torch.testing.assert_close(model.merge_and_unload().eval()(x), again(x), rtol=1e-4, atol=1e-5)


def test_accelerate(tmp_path, monkeypatch):
    accelerate = package('accelerate')
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)  # what a launcher, or another test in this process, left: no group here
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision='bf16')
    model = timm.create_model('test_vim2', num_classes=3)
    data = torch.utils.data.TensorDataset(batch(8), torch.arange(8) % 3)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.AdamW(model.parameters(), 1e-2), torch.utils.data.DataLoader(data, 4))
    for x, y in loader:
        loss = F.cross_entropy(model(x), y)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert loss.isfinite()
    expected = {k: v.clone() for k, v in accelerator.unwrap_model(model).state_dict().items()}
    accelerator.save_state(tmp_path)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    accelerator.load_state(tmp_path)
    assert all(torch.equal(v, expected[k]) for k, v in accelerator.unwrap_model(model).state_dict().items())


def test_lightning(tmp_path):
    lightning = package('pytorch_lightning')

    class Classifier(lightning.LightningModule):
        def __init__(self, name='test_vim2'):
            super().__init__()
            self.save_hyperparameters()
            self.model = timm.create_model(name, num_classes=3)

        def training_step(self, batch, _):
            x, y = batch
            return F.cross_entropy(self.model(x), y)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-2)

    data = torch.utils.data.TensorDataset(batch(8), torch.arange(8) % 3)
    module = Classifier()
    trainer = lightning.Trainer(max_epochs=1, accelerator='cpu', logger=False, enable_progress_bar=False,
                                enable_model_summary=False, default_root_dir=tmp_path)
    trainer.fit(module, torch.utils.data.DataLoader(data, 4))
    assert trainer.global_step == 2
    trainer.save_checkpoint(tmp_path / 'last.ckpt')
    loaded = Classifier.load_from_checkpoint(tmp_path / 'last.ckpt', weights_only=True).eval()
    with torch.no_grad():
        x = batch()
        assert torch.equal(loaded.model(x), module.eval().model(x))


def test_segmentation_models_pytorch():
    """As an encoder, with maps at strides 4 to 32; a stride that it cannot have is refused in words."""
    smp = package('segmentation_models_pytorch')
    model = smp.Unet('tu-test_vim2', encoder_weights=None, classes=2)
    x = batch()
    y = model(x)
    assert y.shape == (2, 2, 64, 64)
    y.square().mean().backward()
    assert all(p.grad is not None for n, p in model.encoder.named_parameters() if '.norm.' not in n and 'stem' in n)
    assert model.encoder.output_stride == 32
    with pytest.raises(ValueError, match='output_stride=16 is not possible, only 32 is'):
        smp.DeepLabV3Plus('tu-test_vim2', encoder_weights=None, encoder_output_stride=16)


def test_any_script_knows_the_models(tmp_path):
    """`python -m vim2 SCRIPT`: what timm's train.py, validate.py and benchmark.py need, which timm's wheel lacks."""
    (tmp_path / 'script.py').write_text(
        'import sys, timm, helper\n'
        "assert __name__ == '__main__'\n"
        "print(sys.argv[1:], timm.is_model('vim2_tiny'), helper.__name__)\n")
    (tmp_path / 'helper.py').write_text('')
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = [sys.executable, '-m', 'vim2', tmp_path / 'script.py', '--model', 'vim2_tiny']
    done = subprocess.run(command, capture_output=True, text=True, env=tool_environment(PYTHONPATH=root))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['--model', 'vim2_tiny'] True helper\n"


@pytest.mark.parametrize('args, code, message', [
    ([], 2, 'how to'), (['--help'], 0, 'how to'), (['-m'], 2, 'how to'),
    (['nothing.py'], 2, 'vim2: there is no script nothing.py'),
])
def test_no_script(args, code, message, capsys):
    with pytest.raises(SystemExit) as end:
        run_script(args, 'vim2', '\nhow to\n')
    assert end.value.code == code and capsys.readouterr().err == message + '\n'
