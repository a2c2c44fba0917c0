import java.net.InetAddress;
import java.net.Socket;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import javax.net.ssl.SSLParameters;
import javax.net.ssl.SSLSocket;
import javax.net.ssl.SSLSocketFactory;

/**
 * A client for the recorder: java Client.java PORT NAME http | socket [PROTOCOL,... [ALPN,...]]
 *
 * It shakes hands with NAME at 127.0.0.1:PORT. The HttpClient resolves the name by itself, so it
 * needs -Djdk.net.hosts.file=FILE.
 */
class Client {
    public static void main(String[] args) throws Exception {
        int port = Integer.parseInt(args[0]);
        String name = args[1];
        if (args[2].equals("http")) {
            HttpRequest request =
                HttpRequest.newBuilder(URI.create("https://" + name + ":" + port + "/")).build();
            HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofString());
            return;
        }
        Socket plain = new Socket(InetAddress.getLoopbackAddress(), port);
        SSLSocketFactory factory = (SSLSocketFactory) SSLSocketFactory.getDefault();
        try (SSLSocket socket = (SSLSocket) factory.createSocket(plain, name, port, true)) {
            SSLParameters parameters = socket.getSSLParameters();
            if (args.length > 3) {
                parameters.setProtocols(args[3].split(","));
            }
            if (args.length > 4) {
                parameters.setApplicationProtocols(args[4].split(","));
            }
            socket.setSSLParameters(parameters);
            socket.startHandshake();
        }
    }
}
