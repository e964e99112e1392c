import com.fasterxml.jackson.databind.DeserializationFeature;
import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import java.io.ByteArrayInputStream;
import java.io.ByteArrayOutputStream;
import java.io.FileNotFoundException;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.security.GeneralSecurityException;
import java.util.Arrays;
import java.util.Base64;
import java.util.HexFormat;
import java.util.Map;
import java.util.TreeMap;
import java.util.UUID;
import java.util.concurrent.ConcurrentHashMap;
import javax.crypto.Cipher;
import javax.crypto.Mac;
import javax.crypto.spec.GCMParameterSpec;
import javax.crypto.spec.SecretKeySpec;
import org.apache.hadoop.conf.Configuration;
import org.apache.hadoop.fs.FSDataInputStream;
import org.apache.hadoop.fs.FileSystem;
import org.apache.hadoop.fs.Path;
import org.apache.parquet.crypto.DecryptionKeyRetriever;
import org.apache.parquet.crypto.FileDecryptionProperties;
import org.apache.parquet.crypto.KeyAccessDeniedException;
import org.apache.parquet.crypto.ParquetCryptoRuntimeException;
import org.apache.parquet.crypto.keytools.PropertiesDrivenCryptoFactory;
import org.apache.parquet.format.Util;

/**
 * Opens encrypted Parquet files through their key files (docs/format.md, "Parquet"), which a KmsClient cannot: it is
 * not told which file a key is of. A file without key file is left to Parquet's own key tools, and so to
 * BeamEnvelopeKmsClient, if beam.envelope.interop is true; else it is read only if it is plain.
 */
public class BeamEnvelopeCryptoFactory extends PropertiesDrivenCryptoFactory {
  /** The encryption context that files were written with: a JSON object, {} if it is not set, or "any". */
  static final String CONTEXT = "beam.envelope.context";

  /** Whether files without key file may be encrypted, with their keys in the footer. */
  static final String INTEROP = "beam.envelope.interop";

  private static final int MAX_KEY_FILE_BYTES = 1 << 20;
  private static final ObjectMapper JSON =
      new ObjectMapper().enable(DeserializationFeature.FAIL_ON_READING_DUP_TREE_KEY);

  @Override
  public FileDecryptionProperties getFileDecryptionProperties(Configuration settings, Path path) {
    try {
      FileSystem files = path.getFileSystem(settings);
      JsonNode keyFile;
      try (FSDataInputStream stream =
          files.open(new Path(path.getParent(), "_KEY_FOR_" + path.getName() + ".json"))) {
        keyFile = JSON.readTree(stream.readNBytes(MAX_KEY_FILE_BYTES));
      } catch (FileNotFoundException none) {
        return settings.getBoolean(INTEROP, false) ? super.getFileDecryptionProperties(settings, path) : null;
      }
      checkAlgorithm(files, path);
      // Not withPlaintextFilesAllowed(): a plain file beside a key file was put in the place of the encrypted one.
      return FileDecryptionProperties.builder().withKeyRetriever(new KeyFile(settings, keyFile, path)).build();
    } catch (IOException failure) {
      throw new ParquetCryptoRuntimeException("cannot read the keys of " + path, failure);
    }
  }

  /** Insists on AES_GCM_V1: Parquet believes the file, in which nothing authenticates the name of its algorithm. */
  private static void checkAlgorithm(FileSystem files, Path path) throws IOException {
    long size = files.getFileStatus(path).getLen();
    try (FSDataInputStream stream = files.open(path)) {
      byte[] tail = new byte[8];
      stream.readFully(size - tail.length, tail);
      int footerBytes = ByteBuffer.wrap(tail).order(ByteOrder.LITTLE_ENDIAN).getInt();
      boolean sealed = new String(tail, 4, 4, StandardCharsets.US_ASCII).equals("PARE");
      if (sealed && footerBytes > 0 && footerBytes < size) {
        byte[] start = new byte[Math.min(footerBytes, 1024)];
        stream.readFully(size - tail.length - footerBytes, start);
        ByteArrayInputStream footer = new ByteArrayInputStream(start);
        sealed = Util.readFileCryptoMetaData(footer).getEncryption_algorithm().isSetAES_GCM_V1();
      }
      if (!sealed) {
        throw new ParquetCryptoRuntimeException(path + " was changed: its footer is not encrypted with AES_GCM_V1");
      }
    }
  }

  /** The keys of one file: each data key is unwrapped when a column under it is first read. */
  private static class KeyFile implements DecryptionKeyRetriever {
    private final Configuration settings;
    private final Path path;
    private final JsonNode dataKeys;
    private final Map<String, String> context = new TreeMap<>();
    private final byte[] binding;
    private final Map<Integer, byte[]> wrappingKeys = new ConcurrentHashMap<>();

    KeyFile(Configuration settings, JsonNode keyFile, Path path) throws IOException {
      this.settings = settings;
      this.path = path;
      if (!keyFile.path("format").asText().equals("beam-envelope key file")
          || keyFile.path("version").asInt() != 1
          || !keyFile.path("cipher").asText().equals("parquet-aes-gcm-v1")) {
        throw new ParquetCryptoRuntimeException("the key file of " + path + " is not that of a Parquet file");
      }
      dataKeys = keyFile.path("data_keys");
      keyFile.path("context").properties().forEach(pair -> context.put(pair.getKey(), pair.getValue().asText()));
      String expected = settings.get(CONTEXT, "{}");
      if (!expected.equals("any") && !JSON.readTree(expected).equals(keyFile.path("context"))) {
        throw new KeyAccessDeniedException(
            path + " was written with the encryption context " + keyFile.path("context") + ", not " + expected);
      }
      binding = binding(keyFile);
    }

    @Override
    public byte[] getKey(byte[] keyMetadata) {
      try {
        JsonNode material = JSON.readTree(keyMetadata);
        String name = material.path("masterKeyID").asText();
        byte[] token = Base64.getDecoder().decode(material.path("wrappedDEK").asText());
        if (!name.matches("k\\d{1,4}") || token.length != 60 || material.path("doubleWrapping").asBoolean(true)) {
          throw new ParquetCryptoRuntimeException(path + " was changed: a key in it has the wrong form");
        }
        Cipher cipher = Cipher.getInstance("AES/GCM/NoPadding");
        SecretKeySpec key = new SecretKeySpec(wrappingKey(Integer.parseInt(name.substring(1))), "AES");
        cipher.init(Cipher.DECRYPT_MODE, key, new GCMParameterSpec(128, token, 0, 12));
        cipher.updateAAD(binding);
        cipher.updateAAD(utf8(name));
        return cipher.doFinal(token, 12, token.length - 12);
      } catch (IOException | GeneralSecurityException | IllegalArgumentException failure) {
        throw new ParquetCryptoRuntimeException(path + " and its key file do not belong together", failure);
      }
    }

    private byte[] wrappingKey(int number) {
      return wrappingKeys.computeIfAbsent(
          number, place -> expand(dataKey(dataKeys.path(place)), 32, utf8("beam-envelope/parquet@v1\0"), binding));
    }

    /** Unwraps a data key with any of the KMS keys that wrapped it and that the settings list. */
    private byte[] dataKey(JsonNode entry) {
      RuntimeException denied = new KeyAccessDeniedException(path + " is under no key of AWS KMS");
      for (JsonNode form : entry.path("wrapped_keys")) {
        if (!form.path("provider").asText().equals("aws-kms")) {
          continue;
        }
        byte[] key;
        try {
          byte[] wrapped = Base64.getDecoder().decode(form.path("wrapped_key").asText());
          String kmsKey = form.path("kms_key").asText();
          key = BeamEnvelopeKmsClient.decrypt(settings, kmsKey, wrapped, context, true);
        } catch (KeyAccessDeniedException refusal) {
          denied = refusal;
          continue;
        }
        String keyId = HexFormat.of().formatHex(expand(key, 16, utf8("beam-envelope/key-id@v1\0")));
        if (key.length == 32 && keyId.equals(entry.path("key_id").asText())) {
          return key;
        }
        throw new ParquetCryptoRuntimeException("the key file of " + path + " was changed: it is of another data key");
      }
      throw denied;
    }
  }

  /** docs/format.md, 2.2. */
  private static byte[] binding(JsonNode keyFile) throws IOException {
    ByteArrayOutputStream bytes = new ByteArrayOutputStream();
    bytes.write(utf8("beam-envelope/shard@v1\0"));
    UUID shard = UUID.fromString(keyFile.path("shard_id").asText());
    ByteBuffer id = ByteBuffer.allocate(16);
    frame(bytes, id.putLong(shard.getMostSignificantBits()).putLong(shard.getLeastSignificantBits()).array());
    frame(bytes, utf8(keyFile.path("cipher").asText()));
    for (String field : new String[] {"compression", "created", "name"}) {
      frame(bytes, utf8(keyFile.path("content").path(field).asText()));
    }
    Map<byte[], byte[]> context = new TreeMap<>(Arrays::compareUnsigned);
    for (Map.Entry<String, JsonNode> pair : keyFile.path("context").properties()) {
      context.put(utf8(pair.getKey()), utf8(pair.getValue().asText()));
    }
    bytes.write(ByteBuffer.allocate(4).putInt(context.size()).array());
    for (Map.Entry<byte[], byte[]> pair : context.entrySet()) {
      frame(bytes, pair.getKey());
      frame(bytes, pair.getValue());
    }
    return bytes.toByteArray();
  }

  private static void frame(ByteArrayOutputStream bytes, byte[] part) throws IOException {
    bytes.write(ByteBuffer.allocate(4).putInt(part.length).array());
    bytes.write(part);
  }

  /** HKDF-Expand with SHA-512 (RFC 5869, 2.3), up to 64 bytes. */
  private static byte[] expand(byte[] key, int size, byte[]... info) {
    try {
      Mac mac = Mac.getInstance("HmacSHA512");
      mac.init(new SecretKeySpec(key, "HmacSHA512"));
      for (byte[] part : info) {
        mac.update(part);
      }
      return Arrays.copyOf(mac.doFinal(new byte[] {1}), size);
    } catch (GeneralSecurityException failure) {
      throw new IllegalStateException(failure);
    }
  }

  private static byte[] utf8(String text) {
    return text.getBytes(StandardCharsets.UTF_8);
  }
}
