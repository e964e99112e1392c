import java.util.Arrays;
import java.util.Base64;
import java.util.HexFormat;
import javax.crypto.Cipher;
import javax.crypto.spec.GCMParameterSpec;
import javax.crypto.spec.SecretKeySpec;
import org.apache.hadoop.conf.Configuration;
import org.apache.parquet.crypto.KeyAccessDeniedException;
import org.apache.parquet.crypto.keytools.KmsClient;

/** Wraps and unwraps Parquet's keys as docs/format.md says, for one file, whose wrapping keys it is given. */
public class DocumentedClient implements KmsClient {
  private Configuration settings;

  @Override
  public void initialize(Configuration configuration, String instance, String url, String token) {
    settings = configuration;
  }

  @Override
  public String wrapKey(byte[] key, String name) {
    byte[] nonce = new byte[12];
    new java.security.SecureRandom().nextBytes(nonce);
    byte[] sealed = run(Cipher.ENCRYPT_MODE, name, nonce, key);
    byte[] wrapped = Arrays.copyOf(nonce, 12 + sealed.length);
    System.arraycopy(sealed, 0, wrapped, 12, sealed.length);
    return Base64.getEncoder().encodeToString(wrapped);
  }

  @Override
  public byte[] unwrapKey(String wrapped, String name) {
    byte[] bytes = Base64.getDecoder().decode(wrapped);
    return run(Cipher.DECRYPT_MODE, name, Arrays.copyOf(bytes, 12), Arrays.copyOfRange(bytes, 12, bytes.length));
  }

  private byte[] run(int mode, String name, byte[] nonce, byte[] input) {
    String key = settings.get("documented.key." + name);
    if (key == null) {
      throw new KeyAccessDeniedException("no wrapping key " + name);
    }
    try {
      Cipher cipher = Cipher.getInstance("AES/GCM/NoPadding");
      cipher.init(mode, new SecretKeySpec(HexFormat.of().parseHex(key), "AES"), new GCMParameterSpec(128, nonce));
      cipher.updateAAD(HexFormat.of().parseHex(settings.get("documented.binding")));
      cipher.updateAAD(name.getBytes("UTF-8"));
      return cipher.doFinal(input);
    } catch (Exception failure) {
      throw new IllegalStateException(failure);
    }
  }
}
