"""tools/predict.py: pictures from anywhere in, labels out."""
import io
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import timm
import torch
from conftest import CLASSES, colored_image, jpeg
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

import _common as common
import predict
from _common import UserError

MODEL = ('--model', 'test_vit', '--model-kwargs', 'img_size=32', 'patch_size=8', '--img-size', 32, '--num-classes', 4)


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(3)
    model = timm.create_model('test_vit', img_size=32, patch_size=8, num_classes=4).eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model


@pytest.fixture(scope='module')
def weights(model, tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'model.safetensors'
    save_file(model.state_dict(), path)
    return path


@pytest.fixture
def classify(tool, weights, tmp_path):
    """Run the tool with the test model; `classify(…)` gives the result, with the JSON report if there is one."""
    labels = tmp_path / 'labels.txt'
    labels.write_text('\n'.join(CLASSES) + '\n')

    def run(*inputs, json_output=True):
        result = tool('predict', *inputs, *MODEL, '--checkpoint', weights, '--labels', labels,
                      *(('--json',) if json_output else ()))
        return (result, json.loads(result.out)) if json_output else result

    return run


def picture(seed=0, size=(50, 40)):
    return colored_image(seed % 4, np.random.default_rng(seed), size)


def probabilities(model, image):
    transform = create_transform(**resolve_data_config(dict(input_size=(3, 32, 32)), model=model), is_training=False)
    with torch.inference_mode():
        return model(transform(image.convert('RGB')).unsqueeze(0)).softmax(-1)[0]


def test_probabilities_are_the_models(classify, model, tmp_path):
    paths = []
    for i in range(5):
        paths.append(tmp_path / f'{i}.png')
        picture(i).save(paths[-1])
    result, report = classify(*paths, '-b', 2, '--topk', 3)
    assert result.code == 0 and result.err == '' and report['skipped'] == []
    assert [r['source'] for r in report['results']] == [str(p) for p in paths]
    assert report['img_size'] == [32, 32]
    for path, row in zip(paths, report['results']):
        want, index = probabilities(model, Image.open(path)).topk(3)
        assert [p['index'] for p in row['predictions']] == index.tolist()
        assert [p['label'] for p in row['predictions']] == [CLASSES[i] for i in index]
        assert [p['probability'] for p in row['predictions']] == pytest.approx(want.tolist(), rel=1e-4)
        assert (row['width'], row['height']) == (50, 40)


def test_table(classify, model, tmp_path):
    picture().save(tmp_path / 'a.png')
    result = classify(tmp_path / 'a.png', '--topk', 99, json_output=False)
    lines = result.out.splitlines()
    assert lines[0] == f'{tmp_path / "a.png"} (50 x 40 px)' and len(lines) == 5  # no more labels than classes
    p, i = probabilities(model, picture()).max(0)
    assert lines[1].split()[:3] == ['1', CLASSES[i], f'{100 * p:.1f}']


def test_folder_with_an_unreadable_picture(classify, tmp_path):
    folder = tmp_path / 'photos'
    (folder / 'deep').mkdir(parents=True)
    picture(0).save(folder / 'img10.png')
    picture(1).save(folder / 'img9.jpg')
    picture(2).save(folder / 'deep' / 'UPPER.JPG')
    (folder / 'broken.jpg').write_bytes(jpeg(picture(3))[:300])
    (folder / 'notes.txt').write_text('not looked at')
    result, report = classify(folder)
    assert result.code == 0
    assert [r['source'] for r in report['results']] == [
        str(folder / p) for p in ('deep/UPPER.JPG', 'img9.jpg', 'img10.png')]
    assert [s['source'] for s in report['skipped']] == [str(folder / 'broken.jpg')]
    skipped, count = result.err.splitlines()
    assert skipped.startswith(f'skipped {folder / "broken.jpg"}: damaged picture: ')
    assert count == '3 classified, 1 skipped'


def test_nothing_readable_is_exit_code_1(classify, tmp_path):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'broken.png').write_bytes(b'\x89PNG\r\n')
    result, report = classify(tmp_path / 'broken.png', tmp_path / 'none.jpg', tmp_path / 'empty')
    assert result.code == 1 and report['results'] == []
    assert [s['error'].split(' (')[0].split(':')[0] for s in report['skipped']] == [
        'not a picture in a format that Pillow knows', 'no such file or folder', 'no picture in this folder']
    assert result.err.splitlines()[-1] == '0 classified, 3 skipped'


# ------------------------------------------------------------------------------------------------------------- reading

def read(image, format, tmp_path, **options):
    path = tmp_path / f'picture.{format}'
    image.save(path, **options)
    return np.asarray(predict.read_picture(str(path), 1.))


def test_photos_are_turned_upright(tmp_path):
    image = picture(size=(48, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to show
    assert np.array_equal(read(image, 'png', tmp_path, exif=exif), np.rot90(np.asarray(image), -1))


def test_transparency_is_white(tmp_path):
    image = picture().convert('RGBA')
    image.putalpha(Image.fromarray(np.uint8([[0] * 25 + [255] * 25] * 40)))
    got = read(image, 'png', tmp_path)
    assert (got[:, :25] == 255).all() and np.array_equal(got[:, 25:], np.asarray(picture())[:, 25:])


def test_16_bit_gray_is_scaled(tmp_path):
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    got = read(Image.fromarray(values), 'png', tmp_path)
    assert np.array_equal(got, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, -1))


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'CMYK', 'YCbCr'])
def test_every_mode_becomes_rgb(mode, tmp_path):
    format = 'tiff' if mode in ('CMYK', 'YCbCr') else 'png'
    got = read(picture().convert(mode), format, tmp_path)
    assert got.shape == (40, 50, 3) and 40 < got.mean() < 160


# ---------------------------------------------------------------------------------------------------------------- URLs

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = jpeg(picture(1))
        path = self.path.split('?')[0]
        if path == '/slow.jpg':
            time.sleep(1.5)
        if path.startswith('/drip'):  # a byte now and then, of the header or of the body
            try:
                self.wfile.write(b'HTTP/1.0 200 OK\r\n' + (b'\r\n' if path == '/drip_body.jpg' else b'X: '))
                for _ in range(60):
                    time.sleep(0.05)
                    self.wfile.write(b'x')
                    self.wfile.flush()
            except OSError:
                pass
            return
        if path == '/moved.jpg':
            self.send_response(302)
            self.send_header('Location', '/cat.jpg')
            self.end_headers()
            return
        if path == '/none.jpg':
            self.send_error(404)
            return
        if path == '/page':
            body = b'<html>no picture</html>'
        self.send_response(200)
        self.send_header('Content-Length', str(len(body) + (1000 if path == '/cut.jpg' else 0)))
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:
            pass  # the client has given up, as it should on /slow.jpg

    def log_message(self, *args):
        pass


@pytest.fixture(scope='module')
def server():
    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f'http://127.0.0.1:{httpd.server_port}'
        httpd.shutdown()
        thread.join()


def test_urls(classify, model, server, tmp_path):
    names = ('cat.jpg?size=big', 'moved.jpg', 'none.jpg', 'page', 'cut.jpg', 'slow.jpg')
    result, report = classify(*(f'{server}/{n}' for n in names), 'http://127.0.0.1:1/refused.jpg',
                              'http://[bad/x.jpg', '--timeout', 0.5, '--annotate', tmp_path / 'out')
    assert result.code == 0
    good = [r['source'] for r in report['results']]
    assert good == [f'{server}/cat.jpg?size=big', f'{server}/moved.jpg']
    want = probabilities(model, Image.open(io.BytesIO(jpeg(picture(1))))).max()
    assert report['results'][0]['predictions'][0]['probability'] == pytest.approx(float(want), rel=1e-4)
    assert [r['annotated'] for r in report['results']] == [str(tmp_path / 'out' / n) for n in ('cat.png', 'moved.png')]
    errors = [s['error'] for s in report['skipped']]
    for error, message in zip(errors, ('HTTP 404', 'not a picture in a format', 'connection broke off after',
                                       'no answer within 0.5 s', 'cannot be fetched', 'cannot be fetched')):
        assert message in error, errors
    assert len(errors) == 6 and result.err.splitlines()[-1] == '2 classified, 6 skipped'


@pytest.mark.parametrize('name', ['drip_body.jpg', 'drip_header.jpg'])
def test_a_server_that_drips_meets_the_timeout(server, name):
    threads = threading.active_count()
    with pytest.raises(predict.Unreadable, match='no answer within 0.4 s'):
        predict.download(f'{server}/{name}', 0.4)  # of the 3 s that all of it would take
    time.sleep(0.1)
    assert not any(isinstance(t, threading.Timer) for t in threading.enumerate()) and threads


def test_a_download_has_a_largest_size(server, monkeypatch):
    monkeypatch.setattr(predict, '_MAX_DOWNLOAD', 100)
    with pytest.raises(predict.Unreadable, match='larger than'):
        predict.download(f'{server}/cat.jpg', 5)


# -------------------------------------------------------------------------------------------------------------- labels

@pytest.mark.parametrize('name, text, first', [
    ('a.txt', 'w\nx\n\ny\nz\n', 'w'), ('a.json', '["w", "x", "y", "z"]', 'w'),
    ('a.json', '{"3": "z", "0": "w", "1": "x", "2": "y"}', 'w')])
def test_label_files(tmp_path, name, text, first):
    (tmp_path / name).write_text(text)
    info = predict.read_labels(str(tmp_path / name), 4)
    assert [info.index_to_description(i) for i in range(4)] == [first, 'x', 'y', 'z']


@pytest.mark.parametrize('name, text, message', [
    ('a.txt', 'w\nx\n', 'names 2 classes, the model has 4'), ('a.txt', '', 'holds no labels'),
    ('a.json', '{', 'holds no labels'), ('a.json', '[1, 2, 3, 4]', 'holds no labels'),
    ('a.json', '7', 'holds no labels'), ('a.json', '{"a": "b"}', 'holds no labels')])
def test_wrong_label_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        predict.read_labels(str(tmp_path / name), 4)


def test_labels_of_the_model_or_of_imagenet():
    model = timm.create_model('test_vit')
    assert predict.label_function(model, None)(281).startswith('tabby')
    model = timm.create_model('test_vit', num_classes=3)
    assert predict.label_function(model, None)(2) == 'class 2'
    model.pretrained_cfg['label_names'] = ('a', 'b', 'c')
    assert predict.label_function(model, None)(2) == 'c'
    model.pretrained_cfg['label_descriptions'] = dict(a='first', b='second', c='third')
    assert predict.label_function(model, None)(1) == 'second'
    model.pretrained_cfg['label_names'] = ('a', 'b')  # of another classifier
    assert predict.label_function(model, None)(1) == 'class 1'


# ---------------------------------------------------------------------------------------------------------- annotation

@pytest.mark.parametrize('size', [(32, 32), (451, 300), (1600, 900), (200, 1000)])
def test_annotated_picture(size):
    image = picture(size=size)
    predictions = [predict.Prediction(i, 'a very long label, ' * i + 'cat', p) for i, p in enumerate((0.9, 0.09, 0.01))]
    out = predict.annotate(image, predictions)
    scale = out.width // size[0]
    assert out.width == scale * size[0] >= 360
    above = out.crop((0, 0, out.width, scale * size[1]))
    assert np.array_equal(np.asarray(above.resize(size, Image.Resampling.NEAREST)), np.asarray(image))
    panel = np.asarray(out)[scale * size[1]:].astype(int)
    rows = np.array_split(panel[:-(panel.shape[0] % 3) or None], 3)
    blue = [(np.abs(row - (86, 156, 255)).sum(-1) < 30).sum() for row in rows]
    assert blue[0] > 0 and blue[1] == blue[2] == 0  # the bar of the best label
    for row in rows:  # text in every row, clear of both edges
        bright = (row.min(-1) > 150).any(0)
        assert bright.any() and not bright[:4].any() and not bright[-4:].any()


def test_a_narrow_picture_is_not_enlarged_without_end():
    out = predict.annotate(picture(size=(1, 200)), [predict.Prediction(0, 'cat', 0.9)])
    assert out.width == 360 and 2000 < out.height < 2200


def test_annotated_files_do_not_overwrite_each_other(classify, tmp_path):
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        picture().save(tmp_path / name / 'same name.jpg')
    result, report = classify(tmp_path / 'a', tmp_path / 'b', '--annotate', tmp_path / 'out')
    assert [r['annotated'] for r in report['results']] == [
        str(tmp_path / 'out' / n) for n in ('same_name.png', 'same_name-2.png')]
    for row in report['results']:
        with Image.open(row['annotated']) as image:
            assert image.width >= 360 and image.height > 300
    (tmp_path / 'file').write_text('')
    result = classify(tmp_path / 'a', '--annotate', tmp_path / 'file' / 'x', json_output=False)
    assert result.code == 2 and 'cannot create the folder' in result.err


# ----------------------------------------------------------------------------------------------------- hostile sources

def test_one_bad_source_costs_only_itself(classify, tmp_path):
    folder = tmp_path / 'photos'
    folder.mkdir()
    picture(0).save(folder / 'good.png')
    os.mkfifo(folder / 'fifo.jpg')
    (folder / 'dangling.jpg').symlink_to('nothing')
    Image.new('1', (1, 80_000)).save(folder / 'long.png')
    with open(os.fsencode(folder) + b'/caf\xe9.png', 'wb') as f:  # no UTF-8
        picture(1).save(f, 'PNG')
    result, report = classify(folder, folder / 'fifo.jpg', '/dev/null', '-b', 3)
    assert result.code == 0, result.err
    assert [os.path.basename(r['source']) for r in report['results']] == ['caf\udce9.png', 'good.png']
    reasons = {os.path.basename(s['source']): s['error'] for s in report['skipped']}
    assert reasons == {
        'dangling.jpg': 'cannot be read: No such file or directory', 'null': 'no regular file, but a pipe, socket or '
        'device', 'fifo.jpg': 'no regular file, but a pipe, socket or device',
        'long.png': 'too large: 1 x 80000 pixels, the limit is 200 times as long as wide'}
    table = classify(folder, json_output=False)
    assert table.code == 0 and r'caf\udce9.png (50 x 40 px)' in table.out


def test_a_folder_that_cannot_be_read_is_named(classify, tmp_path, monkeypatch):
    (tmp_path / 'a' / 'closed').mkdir(parents=True)
    picture(0).save(tmp_path / 'a' / 'good.png')
    scandir = os.scandir

    def unreadable(path):
        if os.path.basename(path) == 'closed':
            raise PermissionError(13, 'Permission denied', path)
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', unreadable)
    result, report = classify(tmp_path / 'a')
    assert len(report['results']) == 1 and report['skipped'] == [
        dict(source=str(tmp_path / 'a' / 'closed'), error='folder cannot be read: Permission denied')]


def test_large_pictures_are_not_kept(weights, model, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, '_MAX_SHOWN', 100)
    picture(0, size=(430, 210)).save(tmp_path / 'a.png')
    classifier = predict.Classifier(model, str, resolve_data_config(dict(input_size=(3, 32, 32)), model=model),
                                    torch.device('cpu'), None)
    kept = classifier.read(str(tmp_path / 'a.png'), 1, shown=True)
    assert (kept.width, kept.height, kept.shown.size, kept.tensor.shape) == (430, 210, (86, 42), (3, 32, 32))
    assert classifier.read(str(tmp_path / 'a.png'), 1, shown=False).shown is None
    monkeypatch.setattr(predict, '_MAX_FILE', 100)
    with pytest.raises(predict.Unreadable, match='larger than'):
        classifier.read(str(tmp_path / 'a.png'), 1, shown=False)


def test_results_come_as_they_are_known(classify, tmp_path, monkeypatch):
    """What was classified before a failure is printed, and the JSON is whole."""
    for i in range(5):
        picture(i).save(tmp_path / f'{i}.png')
    real = predict.read_picture

    def interrupted(source, timeout):
        if source.endswith('4.png'):
            raise KeyboardInterrupt
        return real(source, timeout)

    monkeypatch.setattr(predict, 'read_picture', interrupted)
    result, report = classify(tmp_path, '-b', 2)
    assert result.code == 130 and len(report['results']) == 4


def test_annotated_pictures_that_cannot_be_written(classify, tmp_path, monkeypatch):
    picture(0).save(tmp_path / 'a.png')
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'a.png').symlink_to('/dev/full')
    result, report = classify(tmp_path / 'a.png', '--annotate', tmp_path / 'out')
    assert result.code == 1 and 'annotated' not in report['results'][0]
    assert result.err == f'cannot write {tmp_path}/out/a.png: No space left on device\n'


def test_values_that_are_not_finite_are_no_prediction(tool, model, tmp_path, monkeypatch):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state['head.bias'][1] = float('nan')
    save_file(state, tmp_path / 'nan.safetensors')
    picture(0).save(tmp_path / 'a.png')
    arguments = ('predict', tmp_path / 'a.png', *MODEL, '--checkpoint', tmp_path / 'nan.safetensors')
    result = tool(*arguments)
    assert result.code == 2 and result.err == (
        f'predict.py: error: {tmp_path}/nan.safetensors has weights that are not finite: head.bias\n')
    monkeypatch.setattr(common, 'check_finite', lambda state, what: None)  # as half precision may give with finite ones
    result = tool(*arguments)
    assert result.code == 1 and 'the model gives values that are not finite' in result.err


# -------------------------------------------------------------------------------------------------------------- errors

@pytest.mark.parametrize('more, message', [
    (('--topk', 0), '--topk must be at least 1'), (('--timeout', 0), '--timeout must be positive'),
    (('--model', 'vim2_gigantic'), "unknown model 'vim2_gigantic'"),
    (('--labels', '/nowhere'), 'cannot read the labels'),
    (('--num-classes', 5), 'the checkpoint has 4 classes'), (('--device', 'warp'), "device 'warp' cannot be used")])
def test_mistakes_are_one_line(tool, weights, more, message):
    result = tool('predict', 'x.jpg', *MODEL, '--checkpoint', weights, *more)
    assert result.code == 2 and result.out == '' and message in result.err and len(result.err.splitlines()) == 1


def test_no_arguments(tool):
    result = tool('predict')
    assert result.code == 2 and 'the following arguments are required: INPUT' in result.err
