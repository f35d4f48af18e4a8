"""A Hub on 127.0.0.1, for tests: it speaks the protocol of the Hugging Face Hub to the unmodified client.

What is here is what huggingface_hub asks for when models are pushed and loaded: creating repositories, checking the
card's metadata, preupload, Git LFS (batch, upload, verify), commits as ndjson, branches, pull requests (`refs/pr/1`),
information, trees, `resolve` with its headers (ETag, X-Repo-Commit, X-Linked-*), and access tokens. As on the Hub,
large files are redirected to another origin (here: another port), which must not see the token and understands ranges.
There is no Xet: downloads then use plain HTTP by themselves; uploads do with HF_HUB_DISABLE_XET=1. GitHub's release
pages are redirections to the same storage.

Every request is kept in `requests`; `fail` makes requests to come go wrong.
"""
import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Dict, List, NamedTuple, Optional, Union
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

_LFS_SUFFIXES = ('.safetensors', '.bin', '.pth', '.pt', '.tar', '.png')


class File(NamedTuple):
    """A file of a commit; `lfs` is the SHA-256 under which a large file is stored."""
    data: bytes
    lfs: Optional[str] = None

    @property
    def oid(self) -> str:
        """The hash that git has for it: of a large file, that of its pointer."""
        data = self.data
        if self.lfs:
            data = f'version https://git-lfs.github.com/spec/v1\noid sha256:{self.lfs}\nsize {len(data)}\n'.encode()
        return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


class Commit(NamedTuple):
    files: Dict[str, File]
    title: str
    parent: Optional[str]

    @property
    def oid(self) -> str:
        content = json.dumps([self.title, self.parent, sorted((n, f.oid) for n, f in self.files.items())])
        return hashlib.sha1(content.encode()).hexdigest()


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: Dict[str, Commit] = field(default_factory=dict)
    refs: Dict[str, str] = field(default_factory=dict)  # branches, tags, refs/pr/N

    def __post_init__(self):
        self.add('main', Commit({}, 'initial commit', None))

    def add(self, ref: str, commit: Commit) -> str:
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit.oid

    def find(self, revision: str) -> Optional[str]:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class Request(NamedTuple):
    method: str
    path: str
    status: int
    headers: Dict[str, str]


@dataclass
class Fault:
    """Something that goes wrong with the next `times` requests that match."""
    pattern: str
    kind: Union[int, str]  # a status; 'cut': half the body, then the connection ends; 'flip': one bit is another
    times: int
    method: str


class Problem(Exception):
    """An answer of the Hub that is none of success."""

    def __init__(self, status: int, code: str = '', message: str = '', **headers: str):
        self.status, self.headers = status, dict(headers)
        self.message = message or code
        if code:
            self.headers['X-Error-Code'] = code
        self.headers['X-Error-Message'] = self.message


class HubServer:
    """The server; `with HubServer() as hub: … hub.url`.

    Args:
        tokens: each with the namespaces that it may write to, and ('read',) for one that may only read.
    """

    def __init__(self, tokens=None):
        self.tokens = tokens or {'hf_owner': ('org', 'owner'), 'hf_reader': ('read',), 'hf_stranger': ('stranger',)}
        self.repos: Dict[str, Repo] = {}
        self.store: Dict[str, bytes] = {}  # large files by SHA-256
        self.releases: Dict[str, str] = {}  # GitHub's release pages: path to SHA-256
        self.requests: List[Request] = []
        self.faults: List[Fault] = []
        self.lock = threading.RLock()
        self.hub, self.cdn = (self._listen(handler) for handler in (_Hub, _Storage))
        self.url, self.cdn_url = (f'http://127.0.0.1:{s.server_address[1]}' for s in (self.hub, self.cdn))

    def _listen(self, handler):
        server = ThreadingHTTPServer(('127.0.0.1', 0), type(handler.__name__, (handler,), dict(owner=self)))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True).start()
        return server

    def __enter__(self) -> 'HubServer':
        return self

    def __exit__(self, *_) -> None:
        for server in (self.hub, self.cdn):
            server.shutdown()
            server.server_close()

    # -- for tests

    def commit(self, repo: str, files: Dict[str, bytes], ref: str = 'main', **options) -> str:
        """Put files into a repository without the client; its commit."""
        with self.lock:
            target = self.repos.setdefault(repo, Repo(**options))
            entries = {}
            for name, data in files.items():
                lfs = None
                if name.endswith(_LFS_SUFFIXES):
                    lfs = hashlib.sha256(data).hexdigest()
                    self.store[lfs] = data
                entries[name] = File(data, lfs)
            return target.add(ref, Commit(entries, 'commit of a test', target.refs.get(ref)))

    def release(self, path: str, data: bytes) -> str:
        """Put a file on a release page, `/USER/PROJECT/releases/download/TAG/FILE` (quoted); its address."""
        with self.lock:
            self.releases[path] = hashlib.sha256(data).hexdigest()
            self.store[self.releases[path]] = data
        return self.url + path

    def fail(self, pattern: str, kind: Union[int, str], times: int = 1, method: str = 'GET|HEAD') -> None:
        """Let the next `times` requests whose path matches go wrong."""
        self.faults.append(Fault(pattern, kind, times, method))

    def reset(self) -> None:
        """An empty server, as it was in the beginning."""
        for held in (self.requests, self.faults, self.repos, self.store, self.releases):
            held.clear()

    def seen(self, pattern: str = '', method: str = '') -> List[Request]:
        """The requests so far that match."""
        return [r for r in self.requests if re.search(pattern, r.path) and re.fullmatch(method or '.*', r.method)]


class _Handler(BaseHTTPRequestHandler):
    """What the Hub and its storage have in common: reading, answering, faults."""
    protocol_version = 'HTTP/1.1'
    owner: HubServer
    disable_nagle_algorithm = True

    def log_message(self, *args) -> None:
        pass

    def do(self) -> None:
        length = int(self.headers.get('Content-Length') or 0)
        if self.headers.get('Transfer-Encoding', '').lower() == 'chunked':
            self.body = b''
            while size := int(self.rfile.readline().split(b';')[0], 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            self.body = self.rfile.read(length)
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.fault = None
        with self.owner.lock:
            for fault in self.owner.faults:
                if fault.times and re.search(fault.pattern, self.path) and re.fullmatch(fault.method, self.command):
                    fault.times -= 1
                    self.fault = fault.kind
                    break
            try:
                if isinstance(self.fault, int):
                    raise Problem(self.fault, message='a fault of the test')
                answer = self.answer(parts.path)
            except Problem as e:
                answer = e.status, json.dumps({'error': e.message}).encode(), e.headers
        self.send(*answer)

    do_GET = do_HEAD = do_POST = do_PUT = do

    def send(self, status: int, body: bytes = b'', headers: Optional[Dict[str, str]] = None) -> None:
        with self.owner.lock:
            self.owner.requests.append(Request(self.command, self.path, status, dict(self.headers)))
        if self.fault == 'flip' and self.command == 'GET':
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.send_response(status)
        headers = {'Content-Length': str(len(body)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == 'HEAD':
            return
        if self.fault == 'cut' and len(body) > 1:
            self.wfile.write(body[:len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(body)

    def ranged(self, data: bytes, headers: Dict[str, str]):
        """The whole, or what the client's Range asks for."""
        headers = {'Accept-Ranges': 'bytes', **headers}
        match = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        if not match:
            return 200, data, headers
        start, stop = int(match[1]), int(match[2] or len(data) - 1) + 1
        if start >= len(data):
            raise Problem(416, message='range', **{'Content-Range': f'bytes */{len(data)}'})
        headers['Content-Range'] = f'bytes {start}-{min(stop, len(data)) - 1}/{len(data)}'
        return 206, data[start:stop], headers

    def answer(self, path: str):
        raise NotImplementedError


class _Storage(_Handler):
    """Large files: signed addresses, which must not come with a token."""

    def answer(self, path: str):
        if 'Authorization' in self.headers:
            raise Problem(400, message='the token of the Hub was sent to another host')
        oid = path.rsplit('/', 1)[-1]
        if self.query.get('signature') != [hashlib.sha256(oid.encode()).hexdigest()[:16]]:
            raise Problem(403, message='signature')
        if self.command == 'PUT':
            self.owner.store[oid] = self.body  # as sent: `verify` compares
            return 200, b'', {'ETag': f'"{oid}"'}
        if oid not in self.owner.store:
            raise Problem(404, message='no such object')
        return self.ranged(self.owner.store[oid], {'Content-Type': 'application/octet-stream', 'ETag': f'"{oid}"'})


class _Hub(_Handler):
    """The Hub itself."""

    def answer(self, path: str):
        for method, pattern, name in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and re.fullmatch(method, self.command):
                result = getattr(self, name)(**{k: unquote(v) for k, v in match.groupdict().items() if v is not None})
                if isinstance(result, tuple):
                    return result
                return 200, json.dumps(result).encode(), {'Content-Type': 'application/json'}
        raise Problem(404, message=f'the test server has no {self.command} {path}')

    # -- access

    def namespaces(self) -> Optional[tuple]:
        """Of the token, None without one."""
        header = self.headers.get('Authorization')
        if header is None:
            return None
        token = header.removeprefix('Bearer ')
        if token not in self.owner.tokens:
            raise Problem(401, message='Invalid credentials in Authorization header')
        return self.owner.tokens[token]

    def repo(self, repo: str, write: bool = False) -> Repo:
        names = self.namespaces()
        found = self.owner.repos.get(repo)
        if found is None or (found.private and not names) or (found.private and not {'read', repo.split('/')[0]} &
                                                              set(names)):
            raise Problem(404 if names else 401, 'RepoNotFound', 'Repository not found')
        if found.gated and not write and not (names and {'read', repo.split('/')[0]} & set(names)):
            raise Problem(403 if names else 401, 'GatedRepo', f'Access to model {repo} is restricted')
        if write:
            self.writable(repo.split('/')[0])
        return found

    def writable(self, namespace: str) -> None:
        names = self.namespaces()
        if names is None:
            raise Problem(401, message='Unauthorized')
        if namespace not in names:
            raise Problem(403, message=f"You don't have the rights to write to the namespace {namespace}")

    def at(self, repo: Repo, revision: str) -> str:
        oid = repo.find(revision)
        if oid is None:
            raise Problem(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        return oid

    # -- the API

    def whoami(self):
        names = self.namespaces()
        if names is None:
            raise Problem(401, message='Unauthorized')
        return {'type': 'user', 'name': names[-1], 'orgs': [{'name': n} for n in names[:-1]]}

    def create_repo(self):
        values = json.loads(self.body)
        namespace = values.get('organization') or (self.namespaces() or ('',))[-1]
        self.writable(namespace)
        name = f'{namespace}/{values["name"]}'
        answer = {'url': f'{self.owner.url}/{name}', 'name': name}
        if name in self.owner.repos:
            message = 'You already created this model repo'
            return 409, json.dumps({**answer, 'error': message}).encode(), {'X-Error-Message': message}
        self.owner.repos[name] = Repo(private=values.get('visibility') == 'private' or bool(values.get('private')))
        return answer

    def validate_yaml(self):
        content = json.loads(self.body)['content']
        match = re.match(r'---\n(.*?)\n---\n', content, re.S)
        warnings = [] if match else [{'message': 'empty or missing yaml metadata in repo card'}]
        errors = []
        if match:
            try:
                metadata = yaml.safe_load(match[1])
                for key in ('license', 'pipeline_tag', 'library_name'):
                    if not isinstance(metadata.get(key, ''), str):
                        errors.append({'message': f'"{key}" must be a string'})
                if not isinstance(metadata.get('tags', []), list):
                    errors.append({'message': '"tags" must be an array'})
            except yaml.YAMLError as e:
                errors = [{'message': str(e)}]
        return 400 if errors else 200, json.dumps({'errors': errors, 'warnings': warnings}).encode()

    def info(self, repo: str, revision: str = 'main'):
        found = self.repo(repo)
        oid = self.at(found, revision)
        return {'_id': repo, 'id': repo, 'modelId': repo, 'sha': oid, 'private': found.private, 'gated': found.gated,
                'disabled': False, 'tags': [], 'downloads': 0, 'likes': 0,
                'siblings': [{'rfilename': name} for name in sorted(found.commits[oid].files)]}

    def refs(self, repo: str):
        found = self.repo(repo)
        out = [{'name': n.removeprefix('refs/pr/'), 'ref': n if '/' in n else f'refs/heads/{n}', 'targetCommit': c}
               for n, c in found.refs.items()]
        return {'branches': [r for r in out if 'refs/pr' not in r['ref']], 'tags': [], 'converts': [],
                'pullRequests': [r for r in out if 'refs/pr' in r['ref']]}

    @staticmethod
    def describe(name: str, file: File):
        entry = {'type': 'file', 'path': name, 'size': len(file.data), 'oid': file.oid}
        if file.lfs:
            entry['lfs'] = {'oid': file.lfs, 'size': len(file.data), 'pointerSize': 130}
        return entry

    def tree(self, repo: str, revision: str):
        found = self.repo(repo)
        files = found.commits[self.at(found, revision)].files
        return [self.describe(name, files[name]) for name in sorted(files)]

    def paths_info(self, repo: str, revision: str):
        found = self.repo(repo)
        files = found.commits[self.at(found, revision)].files
        values = parse_qs(self.body.decode()) if not self.body.startswith(b'{') else json.loads(self.body)
        return [self.describe(name, files[name]) for name in values['paths'] if name in files]

    def create_branch(self, repo: str, branch: str):
        found = self.repo(repo, write=True)
        if branch in found.refs:
            raise Problem(409, message=f'Reference already exists: {branch}')
        found.refs[branch] = self.at(found, (json.loads(self.body or b'{}') or {}).get('startingPoint') or 'main')
        return {}

    def preupload(self, repo: str, revision: str):
        found = self.repo(repo, write=not self.query.get('create_pr'))
        files = found.commits[self.at(found, revision)].files
        out = []
        for file in json.loads(self.body)['files']:
            base64.b64decode(file['sample'], validate=True)
            mode = 'lfs' if file['path'].endswith(_LFS_SUFFIXES) or file['size'] > 10_000_000 else 'regular'
            known = files.get(file['path'])
            out.append({'path': file['path'], 'uploadMode': mode, 'shouldIgnore': False,
                        **({'oid': known.lfs or known.oid} if known else {})})
        return {'files': out}

    def lfs_batch(self, repo: str):
        self.repo(repo)
        values = json.loads(self.body)
        if values['operation'] != 'upload' or values['hash_algo'] != 'sha256' or 'basic' not in values['transfers']:
            raise Problem(422, message='batch')
        out = []
        for item in values['objects']:
            entry = {'oid': item['oid'], 'size': item['size'], 'authenticated': True}
            if item['oid'] not in self.owner.store:
                entry['actions'] = {'upload': {'href': self.storage(item['oid']), 'header': {}},
                                    'verify': {'href': f'{self.owner.url}/{repo}.git/info/lfs/verify', 'header': {}}}
            out.append(entry)
        return {'transfer': 'basic', 'objects': out}

    def lfs_verify(self, repo: str):
        self.repo(repo)
        values = json.loads(self.body)
        data = self.owner.store.get(values['oid'], b'')
        if hashlib.sha256(data).hexdigest() != values['oid'] or len(data) != values['size']:
            self.owner.store.pop(values['oid'], None)
            raise Problem(400, message='the uploaded bytes are not those that were announced')
        return {}

    def create_commit(self, repo: str, revision: str):
        pull_request = bool(self.query.get('create_pr'))
        found = self.repo(repo, write=not pull_request)
        if self.namespaces() is None:
            raise Problem(401, message='Unauthorized')
        parent = self.at(found, revision)
        files, title = dict(found.commits[parent].files), None
        for line in self.body.splitlines():
            key, value = (item := json.loads(line))['key'], item['value']
            name = value.get('path', '')
            if key == 'header':
                title = value['summary']
                if value.get('parentCommit') not in (None, parent):
                    raise Problem(412, message='A commit has happened since')
                continue
            if name.startswith('/') or '..' in name.split('/'):
                raise Problem(400, message=f'invalid path {name}')
            if key == 'file':
                files[name] = File(base64.b64decode(value['content']))
            elif key == 'lfsFile':
                if value['algo'] != 'sha256' or value['oid'] not in self.owner.store:
                    raise Problem(400, message=f'LFS pointer of {name} to a file that was not uploaded')
                files[name] = File(self.owner.store[value['oid']], value['oid'])
            elif key == 'deletedFile':
                del files[name]
            else:
                raise Problem(400, message=f'unknown operation {key}')
        answer = {'success': True, 'hookOutput': ''}
        ref = revision
        if pull_request:
            number = 1 + sum(r.startswith('refs/pr/') for r in found.refs)
            ref = f'refs/pr/{number}'
            answer['pullRequestUrl'] = f'{self.owner.url}/{repo}/discussions/{number}'
        oid = found.add(ref, Commit(files, title, parent))
        return {**answer, 'commitOid': oid, 'commitUrl': f'{self.owner.url}/{repo}/commit/{oid}'}

    # -- files

    def storage(self, oid: str) -> str:
        return f'{self.owner.cdn_url}/objects/{oid}?signature={hashlib.sha256(oid.encode()).hexdigest()[:16]}'

    def resolve(self, repo: str, revision: str, name: str):
        found = self.repo(repo)
        oid = self.at(found, revision)
        file = found.commits[oid].files.get(name)
        if file is None:
            raise Problem(404, 'EntryNotFound', 'Entry not found', **{'X-Repo-Commit': oid})
        headers = {'X-Repo-Commit': oid, 'ETag': f'"{file.oid}"'}
        if file.lfs:
            return 302, b'', {**headers, 'Location': self.storage(file.lfs), 'X-Linked-ETag': f'"{file.lfs}"',
                              'X-Linked-Size': str(len(file.data))}
        return self.ranged(file.data, {'Content-Type': 'text/plain; charset=utf-8', **headers})

    def release(self):
        """As GitHub: a redirection to the storage."""
        oid = self.owner.releases.get(urlsplit(self.path).path)
        if oid is None:
            raise Problem(404, message='Not Found')
        return 302, b'', {'Location': self.storage(oid)}


_REPO = r'(?P<repo>[\w.-]+/[\w.-]+)'
_REVISION = r'(?P<revision>[^/]+)'
_ROUTES = (
    ('GET', '/api/whoami-v2', 'whoami'),
    ('POST', '/api/repos/create', 'create_repo'),
    ('POST', '/api/validate-yaml', 'validate_yaml'),
    ('GET', f'/api/models/{_REPO}', 'info'),
    ('GET', f'/api/models/{_REPO}/revision/{_REVISION}', 'info'),
    ('GET', f'/api/models/{_REPO}/refs', 'refs'),
    ('GET', f'/api/models/{_REPO}/tree/{_REVISION}', 'tree'),
    ('POST', f'/api/models/{_REPO}/paths-info/{_REVISION}', 'paths_info'),
    ('POST', f'/api/models/{_REPO}/branch/(?P<branch>[^/]+)', 'create_branch'),
    ('POST', f'/api/models/{_REPO}/preupload/{_REVISION}', 'preupload'),
    ('POST', f'/api/models/{_REPO}/commit/{_REVISION}', 'create_commit'),
    ('POST', rf'/{_REPO}\.git/info/lfs/objects/batch', 'lfs_batch'),
    ('POST', rf'/{_REPO}\.git/info/lfs/verify', 'lfs_verify'),
    ('GET|HEAD', r'/[\w.-]+/[\w.-]+/releases/download/.+', 'release'),
    ('GET|HEAD', f'/{_REPO}/resolve/{_REVISION}/(?P<name>.+)', 'resolve'),
)
