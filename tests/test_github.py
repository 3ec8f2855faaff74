"The workflows and the forms for issues: what GitHub would refuse, by check-jsonschema's schemas and beyond them"
import re, subprocess, sys
from pathlib import Path
import pytest, yaml

root = Path(__file__).resolve().parent.parent
workflows = sorted((root/'.github'/'workflows').glob('*.yml'))
forms = [p for p in sorted((root/'.github'/'ISSUE_TEMPLATE').glob('*.yml')) if p.stem!='config']
targets = set(re.findall(r'^([a-z-]+):', (root/'Makefile').read_text(encoding='utf-8'), re.M))

def read(path):
    "YAML 1.1 reads the key `on` as true"
    o = yaml.safe_load(path.read_text(encoding='utf-8'))
    return {'on' if k is True else k: v for k,v in o.items()}

def wrong_in_workflow(o):
    "What is wrong with a workflow, beyond GitHub's schema, in words"
    wrong = []
    for name,job in o['jobs'].items():
        if 'timeout-minutes' not in job: wrong.append(f'{name}: no timeout-minutes')
        needs = job.get('needs', [])
        wrong += [f'{name}: needs {k}' for k in ([needs] if isinstance(needs, str) else needs) if k not in o['jobs']]
        for i,step in enumerate(job.get('steps', [])):
            if ('uses' in step)==('run' in step): wrong.append(f'{name} {i}: one of uses and run')
            if not re.fullmatch(r'[\w-]+/[\w./-]+@[\w./-]+', step.get('uses', 'a/b@v1')):
                wrong.append(f"{name} {i}: uses {step['uses']}")
            # an expression in a script is a place to inject code: it belongs in env
            if '${{ github' in step.get('run', ''): wrong.append(f'{name} {i}: expression of an event in run')
            for made in re.findall(r'^make (.+)$', step.get('run', ''), re.M):
                for t in made.split():
                    wide = re.sub(r'\$\{\{.*?\}\}', '', made)==made
                    if wide and t not in targets: wrong.append(f'{name} {i}: make {t}')
        ids = {s.get('id') for s in job.get('steps', [])}
        used = set(re.findall(r'steps\.(\w+)\.', str(job)))
        wrong += [f'{name}: steps.{k}' for k in used-ids]
    return wrong

def schema_errors(name, *paths):
    "What a schema that check-jsonschema carries with it says of files; empty where they are right"
    pytest.importorskip('check_jsonschema')
    res = subprocess.run([sys.executable, '-m', 'check_jsonschema', '--builtin-schema', f'vendor.{name}', *paths],
                         capture_output=True, text=True)
    assert res.returncode in (0,1), res.stderr  # 2: it could not be asked
    return res.stdout if res.returncode else ''

@pytest.mark.parametrize('name,paths', [
    ('github-workflows', workflows), ('github-issue-forms', forms),
    ('github-issue-config', [root/'.github'/'ISSUE_TEMPLATE'/'config.yml']),
    ('citation-file-format', [root/'CITATION.cff'])])
def test_schema(name, paths):
    assert paths and schema_errors(name, *paths)==''

def test_schema_finds_what_is_wrong(tmp_path):
    path = tmp_path/'bad.yml'
    path.write_text('on: {pushed: }\njobs:\n  a: {runs-on: x, steps: [{run: "true", iff: 1}]}\n')
    said = schema_errors('github-workflows', path)
    assert 'pushed' in said and 'iff' in said

def test_there_are_all_three(): assert {'test','docs','release'} <= {p.stem for p in workflows}

@pytest.mark.parametrize('path', workflows, ids=lambda p: p.stem)
def test_workflow(path):
    o = read(path)
    assert wrong_in_workflow(o)==[]
    assert o['permissions']=={'contents': 'read'}, 'what is more stands in the job that needs it'

def test_what_is_wrong_is_found():
    bad = {'jobs': {'a': {'needs': 'b', 'steps': [
        {'uses': 'checkout', 'run': 'make nothing'}, {'run': 'echo ${{ github.event.title }} ${{ steps.c.d }}'}]}}}
    assert len(wrong_in_workflow(bad))==7

def test_only_publishing_may_write():
    for path in workflows:
        for name,job in read(path)['jobs'].items():
            assert name=='publish' or 'permissions' not in job, (path.name, name)
    jobs = read(root/'.github'/'workflows'/'release.yml')['jobs']
    assert jobs['publish']['permissions']=={'id-token': 'write'} and jobs['publish']['needs']=='build'
    assert not any('password' in str(s) or 'secrets.' in str(s) for job in jobs.values() for s in job['steps'])

@pytest.mark.parametrize('path', forms, ids=lambda p: p.stem)
def test_form(path):
    "What the schema does not know: each part has an id of its own, and a label; one asks for the doctor"
    body = read(path)['body']
    ids = [b['id'] for b in body]
    assert len(ids)==len(set(ids)) and all(b['attributes']['label'] for b in body)
    assert any('swav doctor' in b['attributes']['label'] for b in body)
