// Encrypts and decrypts with AWS's own Encryption SDK: a JSON list of requests on stdin, a list of answers on stdout.
// NODE_PATH does not serve ES modules, so the folder of node_modules is the argument.
import { createRequire } from 'node:module'
import { readFileSync } from 'node:fs'

const require = createRequire(process.argv[2] + '/')
const { AlgorithmSuiteIdentifier, CommitmentPolicy, KmsKeyringNode, buildClient } = require('@aws-crypto/client-node')

const POLICIES = {
  'forbid-encrypt-allow-decrypt': CommitmentPolicy.FORBID_ENCRYPT_ALLOW_DECRYPT,
  'require-encrypt-allow-decrypt': CommitmentPolicy.REQUIRE_ENCRYPT_ALLOW_DECRYPT,
  'require-encrypt-require-decrypt': CommitmentPolicy.REQUIRE_ENCRYPT_REQUIRE_DECRYPT,
}

async function answer(request) {
  const client = buildClient(POLICIES[request.policy])
  if (request.message !== undefined) {
    const keyring = new KmsKeyringNode({ keyIds: request.keys })
    const { plaintext, messageHeader } = await client.decrypt(keyring, Buffer.from(request.message, 'base64'))
    return { plaintext: plaintext.toString('base64'), context: messageHeader.encryptionContext }
  }
  const [generatorKeyId, ...keyIds] = request.keys
  const keyring = new KmsKeyringNode({ generatorKeyId, keyIds })
  const { result } = await client.encrypt(keyring, Buffer.from(request.plaintext, 'base64'), {
    encryptionContext: request.context,
    frameLength: request.frame_bytes,
    suiteId: parseInt(request.suite, 16),
  })
  return { message: result.toString('base64') }
}

const answers = []
for (const request of JSON.parse(readFileSync(0, 'utf-8'))) {
  try {
    answers.push(await answer(request))
  } catch (error) {
    answers.push({ error: String(error) })
  }
}
process.stdout.write(JSON.stringify(answers))
