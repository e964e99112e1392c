import java.util.ArrayList;
import java.util.Base64;
import java.util.Collections;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.ConcurrentHashMap;
import org.apache.hadoop.conf.Configuration;
import org.apache.parquet.crypto.KeyAccessDeniedException;
import org.apache.parquet.crypto.ParquetCryptoRuntimeException;
import org.apache.parquet.crypto.keytools.KmsClient;
import software.amazon.awssdk.core.SdkBytes;
import software.amazon.awssdk.http.urlconnection.UrlConnectionHttpClient;
import software.amazon.awssdk.regions.Region;
import software.amazon.awssdk.services.kms.KmsClientBuilder;
import software.amazon.awssdk.services.kms.model.DecryptResponse;
import software.amazon.awssdk.services.kms.model.InvalidCiphertextException;
import software.amazon.awssdk.services.kms.model.KmsException;

/**
 * Parquet's KmsClient for AWS KMS: a wrapped key is KMS's ciphertext in base64, without encryption context.
 *
 * <p>It opens and writes files with the keys in their footer: interop=True of create_parquet and open_parquet. Only KMS
 * keys that beam.envelope.keys lists are used, whatever a file says. Credentials, region and endpoint are those of the
 * AWS SDK's usual settings.
 */
public class BeamEnvelopeKmsClient implements KmsClient {
  /** The KMS keys that may be used: aliases (alias/NAME), key ids or ARNs, with commas between them. */
  static final String KEYS = "beam.envelope.keys";

  private static final long UNWRAPPED_TTL_NS = 300_000_000_000L;
  private static final int MAX_ENTRIES = 1000;
  private static final Map<String, software.amazon.awssdk.services.kms.KmsClient> CLIENTS = new ConcurrentHashMap<>();
  private static final Map<List<Object>, Unwrapped> UNWRAPPED =
      Collections.synchronizedMap(
          new LinkedHashMap<>() {
            @Override
            protected boolean removeEldestEntry(Map.Entry<List<Object>, Unwrapped> eldest) {
              return size() > MAX_ENTRIES;
            }
          });

  private Configuration settings;

  private record Unwrapped(byte[] key, String kmsKey, long time) {}

  @Override
  public void initialize(Configuration configuration, String instance, String url, String token) {
    settings = configuration;
  }

  @Override
  public String wrapKey(byte[] key, String name) {
    String kmsKey = candidates(settings, name).get(0);
    try {
      SdkBytes wrapped =
          client(kmsKey).encrypt(call -> call.keyId(kmsKey).plaintext(SdkBytes.fromByteArray(key))).ciphertextBlob();
      return Base64.getEncoder().encodeToString(wrapped.asByteArray());
    } catch (KmsException refusal) {
      throw refused(refusal, kmsKey);
    }
  }

  @Override
  public byte[] unwrapKey(String wrapped, String name) {
    return decrypt(settings, name, Base64.getDecoder().decode(wrapped), Map.of(), false);
  }

  /**
   * Has KMS decrypt a wrapped key with a key that the settings list, and no other.
   *
   * @param name the KMS key that the file names; it only chooses among those in the settings.
   * @param exact whether the name is the ARN of the key that has to be the one.
   */
  static byte[] decrypt(
      Configuration settings, String name, byte[] wrapped, Map<String, String> context, boolean exact) {
    KeyAccessDeniedException denied = null;
    for (String kmsKey : candidates(settings, name)) {
      try {
        Unwrapped found = unwrap(kmsKey, wrapped, context);
        if (exact && !found.kmsKey().equals(name)) {
          throw new ParquetCryptoRuntimeException("a key file names " + name + ", but " + found.kmsKey() + " opens it");
        }
        return found.key().clone();
      } catch (KeyAccessDeniedException refusal) {
        denied = refusal;
      }
    }
    throw denied;
  }

  private static Unwrapped unwrap(String kmsKey, byte[] wrapped, Map<String, String> context) {
    List<Object> entry = List.of(kmsKey, SdkBytes.fromByteArray(wrapped), Map.copyOf(context));
    Unwrapped known = UNWRAPPED.get(entry);
    if (known != null && System.nanoTime() - known.time() < UNWRAPPED_TTL_NS) {
      return known;
    }
    try {
      DecryptResponse answer =
          client(kmsKey)
              .decrypt(
                  call ->
                      call.keyId(kmsKey).ciphertextBlob(SdkBytes.fromByteArray(wrapped)).encryptionContext(context));
      known = new Unwrapped(answer.plaintext().asByteArray(), answer.keyId(), System.nanoTime());
      UNWRAPPED.put(entry, known);
      return known;
    } catch (KmsException refusal) {
      throw refused(refusal, kmsKey);
    }
  }

  /** Returns the keys of the settings that may be the one of this name: that of the same name alone, or all aliases. */
  private static List<String> candidates(Configuration settings, String name) {
    List<String> possible = new ArrayList<>();
    for (String kmsKey : settings.getTrimmedStringCollection(KEYS)) {
      if (bare(kmsKey).equals(bare(name))) {
        return List.of(kmsKey);
      }
      if (bare(kmsKey).startsWith("alias/") && name.startsWith("arn:")) {
        possible.add(kmsKey); // only KMS knows which key it means
      }
    }
    if (possible.isEmpty()) {
      throw new KeyAccessDeniedException("the KMS key " + name + " is none of " + KEYS + ": " + settings.get(KEYS));
    }
    return possible;
  }

  /** Returns alias/NAME or the key id: Parquet libraries cannot carry an ARN, which has colons. */
  private static String bare(String name) {
    String resource = name.startsWith("arn:") ? name.substring(name.lastIndexOf(':') + 1) : name;
    return resource.startsWith("key/") ? resource.substring(4) : resource;
  }

  private static software.amazon.awssdk.services.kms.KmsClient client(String kmsKey) {
    String region = kmsKey.startsWith("arn:") ? kmsKey.split(":")[3] : "";
    return CLIENTS.computeIfAbsent(
        region,
        name -> {
          KmsClientBuilder builder =
              software.amazon.awssdk.services.kms.KmsClient.builder()
                  .httpClientBuilder(UrlConnectionHttpClient.builder());
          return (name.isEmpty() ? builder : builder.region(Region.of(name))).build();
        });
  }

  /** Tells what a key may not do, which leaves other columns readable, from what is wrong with the file or the KMS. */
  private static RuntimeException refused(KmsException refusal, String kmsKey) {
    String message = "KMS key " + kmsKey + ": " + refusal.getMessage();
    if (refusal instanceof InvalidCiphertextException) {
      return new ParquetCryptoRuntimeException(message + ". The file, or its key file, was changed", refusal);
    }
    boolean unavailable = refusal.statusCode() >= 500 || refusal.isThrottlingException();
    return unavailable
        ? new ParquetCryptoRuntimeException(message, refusal)
        : new KeyAccessDeniedException(message, refusal);
  }
}
