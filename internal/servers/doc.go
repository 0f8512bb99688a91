// Package servers runs private PostgreSQL and RabbitMQ servers for development
// and tests, from the distribution's packages and without a container. "make up"
// stands on it, and so does every test that kills a server of its own.
//
// A server is a value with a folder. Data, logs and the chosen port live in it,
// so that any process which names the same folder means the same server:
//
//	broker := &servers.RabbitMQ{Dir: ".dev/rabbitmq-server"}
//	err := broker.Start(ctx) // installs, initialises, recovers, or does nothing
//	conn, err := amqp.Dial(broker.URL())
//
// Faults are methods. Kill is a crash, Pause a machine that hangs; Start and
// Resume heal them:
//
//	err = broker.Kill()
//	err = broker.Start(ctx) // the same port, the same data
//
// Servers listen on loopback alone, outlive the process that started them, and
// never run as root: called by root, each runs as the system user that its
// package made. Tests use package serverstest, which cleans up behind itself.
//
// It finds processes through /proc and packages through apt-get: Debian, Ubuntu
// and their kin. It needs a Linux kernel, but no systemd.
package servers
