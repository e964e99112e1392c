"""S3 for real: versitygw, which checks signatures and keeps its objects as plain files of a folder.

`pytest --s3 versitygw` has the fixtures `moto_server` and `aws` put it in the place of moto's S3; KMS and STS stay
moto's. `NOT_THERE` lists the tests that cannot hold then.
"""

import contextlib
import http.client
import re
import shutil
from pathlib import Path

from tests.engines import build
from tests.engines.server import Server, free_port

ACCESS_KEY = SECRET_KEY = "testing"  # as the fixture `moto_server` has it

_FOLDERS = "a folder of a disk is behind it: `//` in a name is `/` there"
_ONE_USER = "it knows one user, of one region, without session tokens"
_RIGHTS = "moto's IAM decides there who may do what"
NOT_THERE = {
    "test_s3.py::TestStore::test_any_name_can_be_written_found_and_read[two//slashes]": _FOLDERS,
    "test_s3.py::TestClient::test_the_s3_options_of_beam_hold": _ONE_USER,
    "test_s3_role.py": _ONE_USER,
    "test_permissions.py": _RIGHTS,
}


def reason_to_skip(node_id):
    """Return why a test cannot hold with versitygw, or None."""
    return next((reason for part, reason in NOT_THERE.items() if part in node_id), None)


class Gateway(Server):
    """A versitygw on a port of this machine, over `folder/objects`, each bucket a folder in it."""

    def __init__(self, folder):
        folder = Path(folder)
        self.port = free_port()
        self.objects = folder / "objects"
        self.objects.mkdir(parents=True)
        program, address = build.program("versitygw"), f"127.0.0.1:{self.port}"
        credentials = {"ROOT_ACCESS_KEY": ACCESS_KEY, "ROOT_SECRET_KEY": SECRET_KEY}
        command = [program, f"--port={address}", "--keep-alive", "posix", self.objects]
        super().__init__("versitygw", command, folder, credentials)
        self.endpoint = f"http://{address}"
        self.wait_for_port(self.port)

    def start_again(self):
        """Start it again after it was killed, over the same folder."""
        self.start()
        self.wait_for_port(self.port)

    def variables(self):
        """Return the variables that lead boto3 of a process to its S3."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def empty(self, buckets="*"):
        """Remove buckets with all that is in them."""
        for path in self.objects.glob(buckets):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


class S3AtGateway:
    """A WSGI application that sends requests to S3 on to a gateway as they came, and all others to `application`.

    The signature covers the header Host, which is passed on: the gateway checks what the client signed.
    """

    def __init__(self, gateway, application):
        self._gateway, self._application = gateway, application

    def __call__(self, environ, start_response):
        if environ["PATH_INFO"] == "/moto-api/reset":
            self._gateway.empty()
        if not re.search(r"/s3/aws4_request", environ.get("HTTP_AUTHORIZATION", "")):
            return self._application(environ, start_response)
        headers = {name[5:].replace("_", "-"): value for name, value in environ.items() if name.startswith("HTTP_")}
        headers = {name: value for name, value in headers.items() if name not in {"CONNECTION", "EXPECT"}}
        if environ.get("CONTENT_TYPE"):
            headers["CONTENT-TYPE"] = environ["CONTENT_TYPE"]
        if environ.get("CONTENT_LENGTH"):
            headers["CONTENT-LENGTH"] = environ["CONTENT_LENGTH"]
        if environ.get("wsgi.input_terminated"):
            body = environ["wsgi.input"].read()
        else:
            body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self._gateway.port, timeout=60)) as connection:
            connection.request(environ["REQUEST_METHOD"], environ["RAW_URI"], body or None, headers)
            answer = connection.getresponse()
            hop_by_hop = {"connection", "transfer-encoding", "keep-alive", "date", "server"}
            kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in hop_by_hop]
            start_response(f"{answer.status} {answer.reason}", kept)
            return [answer.read()]
